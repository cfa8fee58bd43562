// The CUDA backend on the emulated device, as a module for the tests: the same calls, on CPU tensors. Plans are those
// of the package's own module.
#include <pybind11/pybind11.h>

#include "../bindings_cuda.h"
#include "emulated_device.h"

namespace py = pybind11;
namespace emulation = divnorm::cuda::emulation;

PYBIND11_MODULE(_emulated, m) {
  divnorm::bind_cuda(m);
  m.def("watch", [](uintptr_t address, int64_t bytes) { emulation::watch(reinterpret_cast<void*>(address), bytes); });
  m.def("traffic_of", [](uintptr_t address) {
    const auto traffic = emulation::traffic_of(reinterpret_cast<void*>(address));
    return py::make_tuple(traffic.read, traffic.written);
  });
  m.def("traffic_elsewhere", [] {
    const auto traffic = emulation::traffic_elsewhere();
    return py::make_tuple(traffic.read, traffic.written);
  });
  m.def("set_room", [](int largest_cluster, int most_clusters) {
    emulation::largest_cluster = largest_cluster;
    emulation::most_clusters = most_clusters;
  });
  m.def("forget_traffic", &emulation::forget_traffic);
}
