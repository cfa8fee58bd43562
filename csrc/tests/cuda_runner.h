// Runs a case of definition.h through the CUDA kernels on the emulated device, with a strategy of the caller's choice.
#pragma once

#include <optional>

#include "../cuda/call.h"
#include "definition.h"
#include "emulated_device.h"

namespace divnorm::tests {

struct Setting {
  cuda::Preferences preferences;
  cuda::Device device;
};

constexpr int kSlotBytes = 256;  // of the pipelined kernels' ring

// A small device with `shared_bytes` for a block; cluster 0: two passes. pipeline: of the table.
inline Setting setting(int cluster, int shared_bytes, int pipeline = 0) {
  Setting s;
  s.preferences.cluster = cluster;
  s.preferences.blocks = 1;
  s.preferences.threads = s.preferences.staged_threads = 64;
  s.preferences.bytes_per_thread = 16;
  s.preferences.slice_channels = 2;
  s.preferences.stretch_bytes = 16;
  s.preferences.window_rounds = 4;
  s.preferences.tile_bytes = 1024;
  s.preferences.tile_positions = 64;
  s.preferences.row_positions = 500;
  s.preferences.items = 3;
  s.preferences.cache_share = 0.5;
  s.preferences.pipeline = pipeline;
  s.device.multiprocessors = 2;
  s.device.cache_bytes = 4096;
  s.device.shared_bytes = s.device.block_shared_bytes = shared_bytes;
  s.device.clusters = cluster > 1;
  return s;
}

// The smallest device, or the largest, that brings both directions of a case to the named strategy, where there is one.
inline std::optional<Setting> setting_for(const std::string& strategy, const Case& c, Dtype dtype, int cluster,
                                          bool largest = false) {
  const Problem problem = problem_of(c, dtype), for_backward = problem.in_backward();
  std::optional<Setting> found;
  for (int shared_bytes = 2048; shared_bytes < 1 << 20; shared_bytes += shared_bytes / 8) {
    const Setting s = setting(strategy == "two-pass"       ? 0
                              : strategy == "single-block" ? 1
                                                           : cluster,
                              shared_bytes, strategy == "pipelined" ? kSlotBytes : 0);
    const auto named = [&](Direction direction) {
      const Problem& one = direction == Direction::forward ? problem : for_backward;
      return cuda::choose(one, direction, s.preferences, s.device).name() == strategy;
    };
    if (!named(Direction::forward) || !named(Direction::backward)) continue;
    found = s;
    if (!largest) break;
  }
  return found;
}

// The variance of every row and its rstd are of one deviation.
inline void check_variance(const Case& c, const Numbers& sigma, const Numbers& variance, const Numbers& rstd) {
  for (size_t i = 0; i < rstd.size(); ++i) {
    const double of_sigma = sigma[i % sigma.size()], deviation = std::sqrt(variance[i]);
    const double s = c.p == 1 ? of_sigma + deviation : std::hypot(of_sigma, deviation);
    check(std::fabs(s * rstd[i] - 1) < 1e-6, c.name + ": variance");
  }
}

inline Results run(const Case& c, Dtype dtype, const Inputs& in, const Numbers& grad, const Calls& calls) {
  const Shape shape(c);
  const Dtype compute = compute_dtype(dtype);
  Tensor x(dtype, in.x), dy(dtype, grad), residual(dtype, in.residual);
  Tensor weight(compute, in.weight), bias(compute, in.bias), sigma(compute, in.sigma), threshold(compute, in.threshold);
  Tensor l1(compute, 1), dl1(compute, Numbers{kL1Weight});
  Results r{{dtype, shape.numel}, {compute, shape.maps},   {compute, shape.maps},
            {dtype, shape.numel}, {compute, shape.affine}, {compute, shape.affine},
            {compute, c.groups},  {dtype, shape.numel},    {compute, shape.affine}};
  const auto scratch = [&](Direction direction) {
    return std::make_unique<unsigned char[]>(calls.scratch_bytes(direction));
  };
  ForwardCall forward;
  forward.tensors.x = x.data();
  forward.tensors.y = r.y.data();
  forward.tensors.weight = weight.parameter();
  forward.tensors.bias = bias.parameter();
  forward.tensors.sigma = sigma.parameter();
  if (c.residual) forward.tensors.residual = residual.data();
  if (c.activation == Activation::tlu) forward.tensors.threshold = threshold.parameter();
  forward.tensors.mean = c.summation ? r.mean.data() : nullptr;
  forward.tensors.rstd = c.suppression ? r.rstd.data() : nullptr;
  Tensor variance(compute, shape.maps);
  forward.tensors.variance = c.suppression && c.whole() ? variance.data() : nullptr;
  forward.l1 = c.l1 ? l1.data() : nullptr;
  const auto forward_scratch = scratch(Direction::forward), backward_scratch = scratch(Direction::backward);
  forward.place.scratch = forward_scratch.get();
  calls.forward(forward);
  if (forward.tensors.variance != nullptr) check_variance(c, in.sigma, variance.numbers(), r.rstd.numbers());
  BackwardCall backward;
  backward.tensors.x = x.data();
  backward.tensors.dy = dy.data();
  backward.tensors.mean = forward.tensors.mean;
  backward.tensors.rstd = forward.tensors.rstd;
  backward.tensors.weight = forward.tensors.weight;
  backward.tensors.bias = forward.tensors.bias;
  backward.tensors.sigma = forward.tensors.sigma;
  backward.tensors.threshold = forward.tensors.threshold;
  backward.tensors.dx = r.dx.data();
  backward.tensors.dweight = r.dweight.parameter();
  backward.tensors.dbias = r.dbias.parameter();
  backward.tensors.dsigma = r.dsigma.parameter();
  if (calls.problem().in_backward().residual) {
    backward.tensors.residual = residual.data();
    backward.tensors.dresidual = r.dresidual.data();
  }
  if (c.activation == Activation::tlu) backward.tensors.dthreshold = r.dthreshold.parameter();
  backward.dl1 = c.l1 ? dl1.data() : nullptr;
  backward.place.scratch = backward_scratch.get();
  if (!c.suppression) r.dsigma = Tensor(compute, Numbers(c.groups, 0.0));  // the caller's task
  calls.backward(backward);
  if (c.l1) r.l1 = l1.numbers()[0];
  return r;
}

inline Results run(const Case& c, Dtype dtype, const Inputs& in, const Numbers& grad, const Setting& setting) {
  return run(c, dtype, in, grad,
             cuda::Calls(problem_of(c, dtype), 0, setting.device, setting.preferences, setting.preferences));
}

}  // namespace divnorm::tests
