// Channel normalizations through the CUDA kernels on the emulated device.
#pragma once

#include "../cuda/channels.h"
#include "channel_cases.h"
#include "emulated_device.h"

namespace divnorm::tests {

inline ChannelResults run_channels(const ChannelCase& c, Dtype dtype, const Numbers& x, const Numbers& grad) {
  ChannelProblem problem = c.problem;
  problem.dtype = dtype;
  cuda::Device device;
  device.block_shared_bytes = c.block_shared_bytes;
  const cuda::Channels channels(problem, 0, device);
  const auto scratch = [&](Direction direction) {
    return std::make_unique<unsigned char[]>(channels.scratch_bytes(direction));
  };
  return run(
      c, problem, x, grad,
      [&](const ChannelForward& call) { channels.forward(call, scratch(Direction::forward).get(), 0); },
      [&](const ChannelBackward& call) { channels.backward(call, scratch(Direction::backward).get(), 0); });
}

}  // namespace divnorm::tests
