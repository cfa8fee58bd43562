// The compiled module: plans, and the CPU's two calls, on addresses. Only bindings*.cpp know Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "addresses.h"
#include "cpu/kernels.h"
#include "memory.h"
#include "plan.h"
#ifdef DIVNORM_CUDA
#include "bindings_cuda.h"
#endif

namespace py = pybind11;

namespace divnorm {
namespace {

std::atomic<const CpuKernels*> active_kernels{nullptr};

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
  active_kernels = kernels;
}

Axes axes_of(const std::array<std::array<int64_t, 3>, kAxes>& numbers) {
  Axes axes;
  for (int a = 0; a < kAxes; ++a) axes[a] = {numbers[a][0], numbers[a][1], numbers[a][2]};
  return axes;
}

using FieldArgs = std::optional<std::array<std::array<int64_t, 3>, kAxes>>;

std::unique_ptr<Plan> make_plan(int dtype, bool channels_last, bool over_batch, bool affine_per_position, bool relu,
                                bool whole, int64_t batch, int64_t channels, int64_t groups,
                                std::array<int64_t, kAxes> extent, const FieldArgs& summation,
                                const FieldArgs& suppression) {
  const auto axes = [](const FieldArgs& field) { return field ? std::optional<Axes>(axes_of(*field)) : std::nullopt; };
  return std::make_unique<Plan>(static_cast<Dtype>(dtype), channels_last, over_batch, affine_per_position, relu, whole,
                                batch, channels, groups, extent, axes(summation), axes(suppression));
}

size_t bytes_of(const Problem& problem) {
  const size_t each = problem.dtype == Dtype::float64 ? 8 : problem.dtype == Dtype::float32 ? 4 : 2;
  return static_cast<size_t>(problem.numel()) * each;
}

double forward(const Plan& plan, Address x, Address weight, int weight_dtype, Address bias, int bias_dtype,
               Address sigma, int sigma_dtype, int64_t sigma_count, double sigma_value, Address y, Address maps,
               bool with_l1, bool with_variance, int threads) {
  const Problem& problem = plan.problem();
  double l1 = 0;
  ForwardTensors tensors;
  tensors.x = at<const void>(x);
  tensors.weight = parameter(weight, weight_dtype, problem.affine_size());
  tensors.bias = parameter(bias, bias_dtype, problem.affine_size());
  tensors.sigma = sigma == 0 ? Parameter{&sigma_value, Dtype::float64, 1} : parameter(sigma, sigma_dtype, sigma_count);
  tensors.y = at<void>(y);
  const Maps rows(problem, maps, with_variance);
  tensors.mean = rows.mean;
  tensors.rstd = rows.rstd;
  tensors.variance = rows.variance;
  tensors.l1 = with_l1 ? &l1 : nullptr;
  py::gil_scoped_release release;
  prefer_huge_pages(tensors.y, bytes_of(problem));
  active_kernels.load()->forward(problem, tensors, threads);
  return l1;
}

void backward(const Plan& plan, Address x, Address dy, Address maps, Address weight, int weight_dtype, Address bias,
              int bias_dtype, Address sigma, int sigma_dtype, int64_t sigma_count, double dl1, Address dx,
              Address dweight, Address dbias, Address dsigma, int threads) {
  const Problem& problem = plan.problem();
  BackwardTensors tensors;
  tensors.x = at<const void>(x);
  tensors.dy = at<const void>(dy);
  const Maps both(problem, maps);
  tensors.mean = both.mean;
  tensors.rstd = both.rstd;
  tensors.weight = parameter(weight, weight_dtype, problem.affine_size());
  tensors.bias = parameter(bias, bias_dtype, problem.affine_size());
  tensors.sigma = parameter(sigma, sigma_dtype, sigma_count);
  tensors.dl1 = dl1;
  tensors.dx = at<void>(dx);
  tensors.dweight = parameter(dweight, weight_dtype, problem.affine_size());
  tensors.dbias = parameter(dbias, bias_dtype, problem.affine_size());
  tensors.dsigma = parameter(dsigma, sigma_dtype, sigma_count);
  py::gil_scoped_release release;
  prefer_huge_pages(tensors.dx, bytes_of(problem));
  active_kernels.load()->backward(problem, tensors, threads);
}

}  // namespace
}  // namespace divnorm

PYBIND11_MODULE(_native, m) {
  using namespace divnorm;
  active_kernels = kernels_for(nullptr);
  m.attr("__version__") = DIVNORM_VERSION;
  m.def("instruction_sets", &instruction_sets, "The instruction sets this processor runs, best first.");
  m.def("instruction_set", [] { return active_kernels.load()->name; }, "The one in use.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"));
  py::class_<Plan>(m, "Plan").def(py::init(&make_plan)).def("forward", &forward).def("backward", &backward);
#ifdef DIVNORM_CUDA
  m.attr("cuda_archs") = DIVNORM_CUDA;
  bind_cuda(m);
#else
  m.attr("without_cuda") = DIVNORM_WITHOUT_CUDA;
#endif
}
