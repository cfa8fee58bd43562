#include "bindings_seam.h"

#include "cpu/calls.h"
#include "memory.h"

namespace py = pybind11;

namespace divnorm {
namespace {

void expect_result(void* result, const Problem& problem) {
  if (result != nullptr) prefer_huge_pages(result, static_cast<size_t>(problem.numel() * bytes_of(problem.dtype)));
}

void statistics(const CpuCalls& calls, Address x, const RowPlaces& rows, int threads) {
  ForwardTensors tensors = half<ForwardTensors>(Part::first, x, {}, 0);
  tensors.mean = written(rows[0]);
  tensors.variance = written(rows[1]);
  kernels_in_use().forward(calls.problem(), tensors, threads);
}

double normalize(const CpuCalls& calls, Address x, const RowPlaces& rows, const ParameterPlaces& beside,
                 Address residual, Address y, bool with_l1, int threads) {
  ForwardTensors tensors = half<ForwardTensors>(Part::second, x, beside, residual);
  double l1 = 0;
  tensors.mean = written(rows[0]);
  tensors.rstd = written(rows[1]);
  tensors.y = written(y);
  tensors.l1 = with_l1 ? &l1 : nullptr;
  expect_result(tensors.y, calls.problem());
  kernels_in_use().forward(calls.problem(), tensors, threads);
  return l1;
}

BackwardTensors backward_half(Part part, const Problem& problem, Address dy, double l1_scale, Address x,
                              const RowPlaces& rows, const ParameterPlaces& beside, Address residual) {
  BackwardTensors tensors = half<BackwardTensors>(part, x, beside, residual);
  tensors.dy = read(dy);
  tensors.dl1 = l1_scale * static_cast<double>(problem.numel());
  tensors.mean = read(rows[0]);
  tensors.rstd = read(rows[1]);
  return tensors;
}

void sums(const CpuCalls& calls, Address dy, double l1_scale, Address x, const RowPlaces& rows,
          const ParameterPlaces& beside, Address residual, Address out, const ParameterPlaces& gradients, int threads) {
  const Problem problem = calls.problem().in_backward();
  BackwardTensors tensors = backward_half(Part::first, problem, dy, l1_scale, x, rows, beside, residual);
  tensors.sums = written(out);
  tensors.dweight = parameter(std::get<0>(gradients));
  tensors.dbias = parameter(std::get<1>(gradients));
  tensors.dthreshold = parameter(std::get<2>(gradients));
  kernels_in_use().backward(problem, tensors, threads);
}

void gradient(const CpuCalls& calls, Address dy, double l1_scale, Address x, const RowPlaces& rows, Address slopes,
              const ParameterPlaces& beside, Address residual, Address dx, Address dresidual, int threads) {
  const Problem problem = calls.problem().in_backward();
  BackwardTensors tensors = backward_half(Part::second, problem, dy, l1_scale, x, rows, beside, residual);
  tensors.slopes = read(slopes);
  tensors.dx = written(dx);
  tensors.dresidual = written(dresidual);
  for (void* result : {tensors.dx, tensors.dresidual}) expect_result(result, problem);
  kernels_in_use().backward(problem, tensors, threads);
}

}  // namespace

void bind_seam(py::module_& module) {
  using Releases = py::call_guard<py::gil_scoped_release>;
  module.def("seam_statistics", &statistics, Releases());
  module.def("seam_normalize", &normalize, Releases());
  module.def("seam_sums", &sums, Releases());
  module.def("seam_gradient", &gradient, Releases());
}

}  // namespace divnorm
