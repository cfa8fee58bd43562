// Python's calls of channel normalizations (divnorm_kernels/channels): addresses, and what stands beside them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>

#include "address.h"
#include "channels.h"

namespace divnorm {

using ChannelExtents = std::array<int64_t, 3>;
using ChannelBox = std::optional<std::array<int64_t, 2>>;
using ChannelNumbers = std::array<double, kScalars>;

inline ChannelProblem channel_problem(int dtype, const ChannelExtents& extents, const ChannelBox& box, bool squared) {
  ChannelProblem problem;
  problem.dtype = static_cast<Dtype>(dtype);
  problem.outer = extents[0];
  problem.channels = extents[1];
  problem.inner = extents[2];
  problem.exponential = !box.has_value();
  if (box) {
    problem.before = (*box)[0];
    problem.after = (*box)[1];
  }
  problem.squared = squared;
  return problem;
}

inline ChannelScalars channel_scalars(const ChannelNumbers& numbers, Address learned) {
  ChannelScalars scalars;
  for (int i = 0; i < kScalars; ++i) scalars.value[i] = numbers[i];
  scalars.learned = read(learned);
  return scalars;
}

inline ChannelForward channel_forward(Address x, Address y, const ChannelNumbers& numbers, Address learned) {
  return {read(x), channel_scalars(numbers, learned), written(y)};
}

inline ChannelBackward channel_backward(Address dy, Address x, Address dx, Address dlearned,
                                        const ChannelNumbers& numbers, Address learned) {
  return {read(x), read(dy), channel_scalars(numbers, learned), written(dx), written(dlearned)};
}

// Adds the CPU's functions.
void bind_channels(pybind11::module_& module);

}  // namespace divnorm
