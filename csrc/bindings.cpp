// The compiled module. Only bindings*.*, torch_api.*, plan.*, known_plans.*, call.*, operators.* and shims.* know
// Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings_channels.h"
#include "bindings_gdn.h"
#include "bindings_problem.h"
#include "bindings_seam.h"
#include "call.h"
#include "cpu/calls.h"
#include "operators.h"
#include "plan.h"
#ifdef DIVNORM_CUDA
#include "bindings_cuda.h"
#endif

namespace py = pybind11;

namespace divnorm {
namespace {

std::vector<std::string> instruction_sets() {
  const char* names[kMaxInstructionSets];
  const int count = supported_instruction_sets(names);
  return {names, names + count};
}

void use_instruction_set(const std::string& name) {
  const CpuKernels* kernels = kernels_for(name.c_str());
  if (kernels == nullptr) {
    std::string known;
    for (const std::string& one : instruction_sets()) known += (known.empty() ? "" : ", ") + one;
    throw py::value_error("instruction set: got '" + name + "', expected one of " + known);
  }
  use(*kernels);
}

py::tuple forward(const Plan& plan, const py::object& x, const py::object& weight, const py::object& bias,
                  const py::object& sigma, bool with_l1, bool with_variance, const py::object& residual,
                  const py::object& threshold) {
  const Given given{x.ptr(), weight.ptr(), bias.ptr(), sigma.ptr(), residual.ptr(), threshold.ptr()};
  Arguments arguments;
  if (!torch::view_of(given.x, arguments.x) || !arguments_of(given, arguments) || !plan.fits(arguments, {false, true}))
    throw std::runtime_error("a plan was called with tensors that it was not made for");
  const Results results = plan.forward(given, arguments, with_l1, with_variance, true);
  return py::make_tuple(results.y, results.maps, results.l1);
}

py::tuple backward(const Plan& plan, const py::object& dy, const py::object& dl1, const py::object& x,
                   const py::object& maps, const py::object& weight, const py::object& bias, const py::object& sigma,
                   const Needs& needs, const py::object& residual, const py::object& threshold) {
  Gradients gradients;
  const Saved saved{{x.ptr(), weight.ptr(), bias.ptr(), sigma.ptr(), residual.ptr(), threshold.ptr()}, maps.ptr()};
  if (!plan.backward(dy.ptr(), dl1.ptr(), saved, Py_None, needs, gradients))
    throw std::runtime_error("a plan was called with tensors that it was not made for");
  return std::apply([](const auto&... one) { return py::make_tuple(one...); }, gradients);
}

}  // namespace
}  // namespace divnorm

PYBIND11_MODULE(_native, m) {
  using namespace divnorm;
  m.attr("__version__") = DIVNORM_VERSION;
  m.def("instruction_sets", &instruction_sets, "The instruction sets this processor runs, best first.");
  m.def("instruction_set", [] { return kernels_in_use().name; }, "The one in use.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"));
  m.def("connect", &torch::connect);
  py::class_<CpuCalls>(m, "CpuCalls")
      .def(py::init([](const py::object& geometry, int dtype, bool channels_last, bool residual) {
        return std::make_unique<CpuCalls>(problem_of(geometry, dtype, channels_last, residual));
      }))
      .def_property_readonly("capsule",
                             [](const CpuCalls& calls) { return capsule_of(static_cast<const Calls*>(&calls)); });
  py::class_<Plan>(m, "Plan")
      .def(py::init<py::object, py::object, py::object, py::object, bool>())
      .def_property_readonly("geometry", &Plan::geometry)
      .def_property_readonly("backend", &Plan::backend)
      .def_property_readonly("native", &Plan::native)
      .def("forward", &forward)
      .def("backward", &backward);
  bind_channels(m);
  bind_gdn(m);
  bind_seam(m);
  bind_call(m);
  bind_operators(m);
#ifdef DIVNORM_CUDA
  m.attr("cuda_archs") = DIVNORM_CUDA;
  bind_cuda(m);
#else
  m.attr("without_cuda") = DIVNORM_WITHOUT_CUDA;
#endif
}
