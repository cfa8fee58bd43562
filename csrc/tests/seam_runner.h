// Runs a case of definition.h through the CUDA kernels by its halves (cuda/seam.h), with statistics as they are.
#pragma once

#include "../cuda/seam.h"
#include "cuda_runner.h"

namespace divnorm::tests {

inline bool has_halves(const Case& c) { return c.whole() && c.summation && c.suppression && c.p == 2; }

inline Results run_halves(const Case& c, Dtype dtype, const Inputs& in, const Numbers& grad, const Setting& setting) {
  const Shape shape(c);
  const Dtype compute = compute_dtype(dtype);
  const Problem problem = problem_of(c, dtype);
  const cuda::Seam seam(problem, 0, setting.device, setting.preferences, setting.preferences);
  Tensor x(dtype, in.x), dy(dtype, grad), residual(dtype, in.residual);
  Tensor weight(compute, in.weight), bias(compute, in.bias), threshold(compute, in.threshold);
  Tensor l1(compute, 1), variance(compute, shape.maps), sums(compute, 3 * shape.maps);
  const double l1_scale = c.l1 ? kL1Weight / static_cast<double>(shape.numel) : 0;
  Tensor dl1(compute, Numbers{l1_scale});
  Results r{{dtype, shape.numel}, {compute, shape.maps},   {compute, shape.maps},
            {dtype, shape.numel}, {compute, shape.affine}, {compute, shape.affine},
            {compute, c.groups},  {dtype, shape.numel},    {compute, shape.affine}};
  const auto given = [&](auto& tensors, Part part, bool with_residual) {
    tensors.part = part;
    tensors.x = x.data();
    tensors.mean = r.mean.data();
    tensors.rstd = r.rstd.data();
    tensors.weight = weight.parameter();
    tensors.bias = bias.parameter();
    if (with_residual) tensors.residual = residual.data();
    if (c.activation == Activation::tlu) tensors.threshold = threshold.parameter();
  };
  const auto scratch = [&](Direction direction, Part part) {
    return std::make_unique<unsigned char[]>(seam.scratch_bytes(direction, part));
  };
  const auto forward = [&](ForwardCall& call) {
    const auto memory = scratch(Direction::forward, call.tensors.part);
    call.place.scratch = memory.get();
    seam.forward(call);
  };
  const auto backward = [&](BackwardCall& call) {
    const auto memory = scratch(Direction::backward, call.tensors.part);
    call.place.scratch = memory.get();
    seam.backward(call);
  };

  ForwardCall statistics, normalize;
  statistics.tensors.part = Part::first;
  statistics.tensors.x = x.data();
  statistics.tensors.mean = r.mean.data();
  statistics.tensors.variance = variance.data();
  forward(statistics);
  Numbers rstd = variance.numbers();
  for (int64_t row = 0; row < shape.maps; ++row)
    rstd[row] = 1 / std::sqrt(rstd[row] + std::pow(in.sigma[row % c.groups], 2));
  r.rstd = Tensor(compute, rstd);
  given(normalize.tensors, Part::second, c.residual);
  normalize.tensors.y = r.y.data();
  normalize.l1 = c.l1 ? l1.data() : nullptr;
  forward(normalize);
  if (c.l1) r.l1 = l1.numbers()[0];

  const bool in_front = problem.in_backward().residual;
  BackwardCall first, second;
  given(first.tensors, Part::first, in_front);
  first.tensors.dy = dy.data();
  first.tensors.sums = sums.data();
  first.tensors.dweight = r.dweight.parameter();
  first.tensors.dbias = r.dbias.parameter();
  if (c.activation == Activation::tlu) first.tensors.dthreshold = r.dthreshold.parameter();
  first.dl1 = c.l1 ? dl1.data() : nullptr;
  backward(first);
  const Numbers all = sums.numbers();
  const double count = static_cast<double>(shape.numel / shape.maps);
  Numbers slopes(2 * shape.maps), dsigma(c.groups, 0.0);
  for (int64_t row = 0; row < shape.maps; ++row) {
    const double product = all[shape.maps + row], sigma = in.sigma[row % c.groups];
    slopes[row] = product * rstd[row] * rstd[row] / count;
    slopes[shape.maps + row] =
        ((c.subtract_mean ? all[row] * rstd[row] : 0) + l1_scale * all[2 * shape.maps + row]) / count;
    dsigma[row % c.groups] -= sigma * product * std::pow(rstd[row], 3);
  }
  r.dsigma = Tensor(compute, dsigma);
  Tensor of_rows(compute, slopes);
  given(second.tensors, Part::second, in_front);
  second.tensors.dy = dy.data();
  second.tensors.slopes = of_rows.data();
  second.tensors.dx = r.dx.data();
  second.tensors.dresidual = in_front ? r.dresidual.data() : nullptr;
  second.dl1 = first.dl1;
  backward(second);
  return r;
}

}  // namespace divnorm::tests
