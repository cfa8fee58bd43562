// The CUDA backend on the emulated device, as a module for the tests: the same calls, on CPU tensors. Plans are those
// of the package's own module; here calls are made on addresses too, which can be watched before.
#include <pybind11/pybind11.h>

#include "../bindings_cuda.h"
#include "../cuda/call.h"
#include "emulated_device.h"

namespace py = pybind11;
namespace emulation = divnorm::cuda::emulation;

namespace {

using divnorm::Parameter;

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

// A call with both maps, one after the other, and with parameters in the type of the sums, one sigma among them.
template <class Tensors>
void fill(const divnorm::Problem& problem, Tensors& tensors, uintptr_t x, uintptr_t maps, uintptr_t weight,
          uintptr_t bias, uintptr_t sigma) {
  const divnorm::Dtype sums = problem.compute();
  tensors.x = at(x);
  tensors.mean = at(maps);
  tensors.rstd = at(maps + problem.map_bytes());
  tensors.weight = {at(weight), sums, problem.affine_size()};
  tensors.bias = {at(bias), sums, problem.affine_size()};
  tensors.sigma = {at(sigma), sums, 1};
}

void forward(const divnorm::cuda::Calls& calls, uintptr_t x, uintptr_t maps, uintptr_t weight, uintptr_t bias,
             uintptr_t sigma, uintptr_t y, uintptr_t l1, uintptr_t scratch) {
  divnorm::ForwardCall call;
  fill(calls.problem(), call.tensors, x, maps, weight, bias, sigma);
  call.tensors.y = at(y);
  call.l1 = at(l1);
  call.place.scratch = at(scratch);
  calls.forward(call);
}

void backward(const divnorm::cuda::Calls& calls, uintptr_t x, uintptr_t maps, uintptr_t weight, uintptr_t bias,
              uintptr_t sigma, uintptr_t dy, uintptr_t dl1, uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
              uintptr_t dsigma, uintptr_t scratch) {
  divnorm::BackwardCall call;
  fill(calls.problem(), call.tensors, x, maps, weight, bias, sigma);
  const auto like = [](const Parameter& parameter, uintptr_t address) {
    return Parameter{at(address), parameter.dtype, parameter.count};
  };
  call.tensors.dy = at(dy);
  call.dl1 = at(dl1);
  call.tensors.dx = at(dx);
  call.tensors.dweight = like(call.tensors.weight, dweight);
  call.tensors.dbias = like(call.tensors.bias, dbias);
  call.tensors.dsigma = like(call.tensors.sigma, dsigma);
  call.place.scratch = at(scratch);
  calls.backward(call);
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  divnorm::bind_cuda(m);
  m.def("forward", &forward);
  m.def("backward", &backward);
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
  m.def("lookups", [] { return py::make_tuple(emulation::lookups().own, emulation::lookups().others); });
  m.def("forget_traffic", &emulation::forget_traffic);
}
