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

inline std::unique_ptr<Plan> plan_of(const Case& c, Dtype dtype) {
  return std::make_unique<Plan>(dtype, c.channels_last, c.over_batch, c.features, c.relu, c.whole(), c.batch,
                                c.channels, c.groups, c.extent, c.summation, c.suppression);
}

// A small device with `shared_bytes` for a block; cluster 0: two passes.
inline Setting setting(int cluster, int shared_bytes) {
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
  s.device.multiprocessors = 2;
  s.device.cache_bytes = 4096;
  s.device.shared_bytes = s.device.block_shared_bytes = shared_bytes;
  s.device.clusters = cluster > 1;
  return s;
}

// The smallest device that brings both directions of a case to the named strategy, where there is one.
inline std::optional<Setting> setting_for(const std::string& strategy, const Case& c, Dtype dtype, int cluster) {
  const auto plan = plan_of(c, dtype);
  for (int shared_bytes = 2048; shared_bytes < 1 << 20; shared_bytes += shared_bytes / 8) {
    const Setting s = setting(strategy == "two-pass" ? 0 : strategy == "single-block" ? 1 : cluster, shared_bytes);
    const auto named = [&](cuda::Direction direction) {
      return cuda::choose(plan->problem(), direction, s.preferences, s.device).name() == strategy;
    };
    if (named(cuda::Direction::forward) && named(cuda::Direction::backward)) return s;
  }
  return std::nullopt;
}

inline Results run(const Case& c, Dtype dtype, const Inputs& in, const Numbers& grad, const Setting& setting) {
  const Shape shape(c);
  const Dtype compute = dtype == Dtype::float64 ? dtype : Dtype::float32;
  const auto plan = plan_of(c, dtype);
  const cuda::Calls calls(*plan, 0, setting.device, setting.preferences, setting.preferences);
  Tensor x(dtype, in.x), dy(dtype, grad), weight(compute, in.weight), bias(compute, in.bias), sigma(compute, in.sigma);
  Tensor l1(compute, 1), dl1(compute, Numbers{kL1Weight});
  Results r{{dtype, shape.numel},    {compute, shape.maps},   {compute, shape.maps}, {dtype, shape.numel},
            {compute, shape.affine}, {compute, shape.affine}, {compute, c.groups}};
  const auto scratch = [&](cuda::Direction direction) {
    return std::make_unique<unsigned char[]>(calls.scratch_bytes(direction));
  };
  cuda::Call forward;
  forward.tensors.x = x.data();
  forward.tensors.out = r.y.data();
  forward.tensors.weight = weight.parameter();
  forward.tensors.bias = bias.parameter();
  forward.tensors.sigma = sigma.parameter();
  forward.tensors.mean = c.summation ? r.mean.data() : nullptr;
  forward.tensors.rstd = c.suppression ? r.rstd.data() : nullptr;
  forward.l1 = c.l1 ? l1.data() : nullptr;
  const auto forward_scratch = scratch(cuda::Direction::forward), backward_scratch = scratch(cuda::Direction::backward);
  forward.scratch = forward_scratch.get();
  calls.run(cuda::Direction::forward, forward);
  cuda::Call backward;
  backward.tensors = forward.tensors;
  backward.tensors.dy = dy.data();
  backward.tensors.out = r.dx.data();
  backward.tensors.dl1 = c.l1 ? dl1.data() : nullptr;
  backward.dweight = r.dweight.parameter();
  backward.dbias = r.dbias.parameter();
  backward.dsigma = r.dsigma.parameter();
  backward.scratch = backward_scratch.get();
  if (!c.suppression) r.dsigma = Tensor(compute, Numbers(c.groups, 0.0));  // the caller's task
  calls.run(cuda::Direction::backward, backward);
  if (c.l1) r.l1 = l1.numbers()[0];
  return r;
}

}  // namespace divnorm::tests
