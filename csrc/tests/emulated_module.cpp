// The CUDA backend on the emulated device, as a module for the tests: the same calls, on CPU tensors. Plans are those
// of the package's own module; here calls are made on addresses too, which can be watched before.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../bindings_cuda.h"
#include "../cuda/call.h"
#include "emulated_device.h"

namespace py = pybind11;
namespace emulation = divnorm::cuda::emulation;

namespace {

using divnorm::Parameter;

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

// A call with both maps, one after the other, and with parameters in the type of the sums, one sigma among them.
// Residual and threshold: 0 where there is none.
template <class Tensors>
void fill(const divnorm::Problem& problem, Tensors& tensors, uintptr_t x, uintptr_t maps, uintptr_t weight,
          uintptr_t bias, uintptr_t sigma, uintptr_t residual, uintptr_t threshold) {
  const divnorm::Dtype sums = problem.compute();
  tensors.x = at(x);
  tensors.mean = at(maps);
  tensors.rstd = at(maps + problem.map_bytes());
  tensors.weight = {at(weight), sums, problem.affine_size()};
  tensors.bias = {at(bias), sums, problem.affine_size()};
  tensors.sigma = {at(sigma), sums, 1};
  tensors.residual = at(residual);
  if (threshold != 0) tensors.threshold = {at(threshold), sums, problem.affine_size()};
}

void forward(const divnorm::cuda::Calls& calls, uintptr_t x, uintptr_t maps, uintptr_t weight, uintptr_t bias,
             uintptr_t sigma, uintptr_t residual, uintptr_t threshold, uintptr_t y, uintptr_t l1, uintptr_t scratch) {
  divnorm::ForwardCall call;
  fill(calls.problem(), call.tensors, x, maps, weight, bias, sigma, residual, threshold);
  call.tensors.y = at(y);
  call.l1 = at(l1);
  call.place.scratch = at(scratch);
  calls.forward(call);
}

void backward(const divnorm::cuda::Calls& calls, uintptr_t x, uintptr_t maps, uintptr_t weight, uintptr_t bias,
              uintptr_t sigma, uintptr_t residual, uintptr_t threshold, uintptr_t dy, uintptr_t dl1, uintptr_t dx,
              uintptr_t dweight, uintptr_t dbias, uintptr_t dsigma, uintptr_t dresidual, uintptr_t dthreshold,
              uintptr_t scratch) {
  divnorm::BackwardCall call;
  fill(calls.problem(), call.tensors, x, maps, weight, bias, sigma, residual, threshold);
  const auto like = [](const Parameter& parameter, uintptr_t address) {
    return Parameter{at(address), parameter.dtype, parameter.count};
  };
  call.tensors.dy = at(dy);
  call.dl1 = at(dl1);
  call.tensors.dx = at(dx);
  call.tensors.dweight = like(call.tensors.weight, dweight);
  call.tensors.dbias = like(call.tensors.bias, dbias);
  call.tensors.dsigma = like(call.tensors.sigma, dsigma);
  call.tensors.dresidual = at(dresidual);
  if (threshold != 0) call.tensors.dthreshold = like(call.tensors.threshold, dthreshold);
  call.place.scratch = at(scratch);
  calls.backward(call);
}

}  // namespace

PYBIND11_MODULE(DIVNORM_MODULE, m) {
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
  using emulation::Phase;
  py::enum_<emulation::Ending>(m, "Ending", py::module_local())
      .value("block", emulation::Ending::block)
      .value("cluster", emulation::Ending::cluster)
      .value("cluster_shared", emulation::Ending::cluster_shared)
      .value("kernel", emulation::Ending::kernel)
      .value("warps", emulation::Ending::warps)
      .value("mbarrier", emulation::Ending::mbarrier);
  py::class_<Phase>(m, "Phase", py::module_local())
      .def_readonly("launch", &Phase::launch)
      .def_readonly("block", &Phase::block)
      .def_readonly("index", &Phase::index)
      .def_readonly("warp", &Phase::warp)
      .def_readonly("threads", &Phase::threads)
      .def_readonly("ending", &Phase::ending)
      .def_readonly("shared", &Phase::shared)
      .def_readonly("others", &Phase::others)
      .def_readonly("global_", &Phase::global)
      .def_readonly("wavefronts", &Phase::wavefronts)
      .def_readonly("shared_bytes", &Phase::shared_bytes)
      .def_readonly("least", &Phase::least)
      .def_readonly("read", &Phase::read)
      .def_readonly("written", &Phase::written)
      .def_readonly("shuffles", &Phase::shuffles)
      .def_readonly("at_work", &Phase::at_work)
      .def_readonly("done", &Phase::done)
      .def_readonly("depth", &Phase::depth)
      .def_readonly("depth_others", &Phase::depth_others);
  m.def("wavefronts", [](const std::vector<uintptr_t>& addresses, int bytes) {
    std::vector<emulation::Access> lanes;
    for (const uintptr_t address : addresses) lanes.push_back({0, address, bytes});
    const emulation::Wavefronts found = emulation::wavefronts_of(lanes);
    return py::make_tuple(found.taken, found.least);
  });
  m.def("keep_costs", &emulation::keep_costs);
  m.def("costs", [] { return emulation::costs().phases; });
  m.def("conflicts", [] {
    const emulation::Conflicts found = emulation::costs().conflicts;
    return py::make_tuple(found.races, found.unordered);
  });
  py::enum_<emulation::Word> words(m, "Word", py::module_local());
  for (int word = 0; word < emulation::kWords; ++word)
    words.value(emulation::kWordNames[word], static_cast<emulation::Word>(word));
  m.def("leave_out", &emulation::leave_out, py::arg("word"), py::arg("launch"), py::arg("index"), py::arg("warp") = -1);
  m.def("met", &emulation::met);
  m.def("schedule", &emulation::schedule);
  m.def("launched", [] {
    py::list all;
    for (const emulation::Launched& l : emulation::costs().launches)
      all.append(py::make_tuple(l.blocks, l.run, l.cluster, l.threads, l.shared_bytes));
    return all;
  });
}
