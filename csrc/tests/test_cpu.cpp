// The CPU kernels without Python, for sanitizers: every instruction set this processor runs.
#include "../cpu/kernels.h"
#include "channel_cases.h"
#include "definition.h"

namespace {

using namespace divnorm;
using namespace divnorm::tests;

Results run(const CpuKernels& kernels, const Case& c, Dtype dtype, const Inputs& in, const Numbers& grad, int threads) {
  const Shape shape(c);
  const Dtype compute = dtype == Dtype::float64 ? dtype : Dtype::float32;
  const Problem problem = problem_of(c, dtype), for_backward = problem.in_backward();
  Tensor x(dtype, in.x), dy(dtype, grad), residual(dtype, in.residual);
  Tensor weight(compute, in.weight), bias(compute, in.bias), sigma(compute, in.sigma), threshold(compute, in.threshold);
  Results r{{dtype, shape.numel}, {compute, shape.maps},   {compute, shape.maps},
            {dtype, shape.numel}, {compute, shape.affine}, {compute, shape.affine},
            {compute, c.groups},  {dtype, shape.numel},    {compute, shape.affine}};
  ForwardTensors f;
  f.x = x.data();
  f.weight = weight.parameter();
  f.bias = bias.parameter();
  f.sigma = sigma.parameter();
  if (problem.residual) f.residual = residual.data();
  if (c.activation == Activation::tlu) f.threshold = threshold.parameter();
  f.y = r.y.data();
  f.mean = c.summation ? r.mean.data() : nullptr;
  f.rstd = c.suppression ? r.rstd.data() : nullptr;
  Tensor variance(compute, shape.maps);
  f.variance = c.suppression && c.whole() ? variance.data() : nullptr;
  f.l1 = c.l1 ? &r.l1 : nullptr;
  kernels.forward(problem, f, threads);
  BackwardTensors b;
  b.x = x.data();
  b.dy = dy.data();
  b.mean = f.mean;
  b.rstd = f.rstd;
  b.weight = f.weight;
  b.bias = f.bias;
  b.sigma = f.sigma;
  b.threshold = f.threshold;
  b.dl1 = c.l1 ? kL1Weight : 0;
  b.dx = r.dx.data();
  b.dweight = r.dweight.parameter();
  b.dbias = r.dbias.parameter();
  b.dsigma = r.dsigma.parameter();
  if (for_backward.residual) {
    b.residual = f.residual;
    b.dresidual = r.dresidual.data();
  }
  if (c.activation == Activation::tlu) b.dthreshold = r.dthreshold.parameter();
  kernels.backward(for_backward, b, threads);
  return r;
}

ChannelResults run_channels(const CpuKernels& kernels, const ChannelCase& c, Dtype dtype, const Numbers& x,
                            const Numbers& grad) {
  ChannelProblem problem = c.problem;
  problem.dtype = dtype;
  return run(
      c, problem, x, grad, [&](const ChannelForward& call) { kernels.channels_forward(problem, call, 3); },
      [&](const ChannelBackward& call) { kernels.channels_backward(problem, call, 3); });
}

}  // namespace

int main() {
  const char* names[kMaxInstructionSets];
  const int count = supported_instruction_sets(names);
  std::vector<Case> all = cases();
  for (const Case& c : family_cases()) all.push_back(c);
  for (int i = 0; i < count; ++i)
    for (const Case& c : all)
      check_case(names[i], c, {2, 3, 7},
                 [&](const Case& one, Dtype dtype, const Inputs& in, const Numbers& grad, int threads) {
                   return run(*kernels_for(names[i]), one, dtype, in, grad, threads == 0 ? 1 : threads);
                 });
  for (int i = 0; i < count; ++i)
    for (const ChannelCase& c : channel_cases())
      check_channels(c, [&](const ChannelCase& one, Dtype dtype, const Numbers& x, const Numbers& grad) {
        return run_channels(*kernels_for(names[i]), one, dtype, x, grad);
      });
  check(kernels_for("none such") == nullptr, "an unknown instruction set");
  std::printf("%d instruction sets, %zu cases each, %d failures\n", count, all.size(), failures);
  return failures == 0 ? 0 : 1;
}
