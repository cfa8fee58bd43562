// What a channel normalization computes: y = n / D^beta with D = k + a * S, where S of a channel weighs the squares of
// x around it, and n is x or its square. Shared by every native backend.
#pragma once

#include <cmath>
#include <cstdint>

#include "problem.h"

namespace divnorm {

// x is `outer` blocks of `channels` rows with `inner` numbers each, without gaps. S of channel c is the sum over the
// channels c - before .. c + after, as far as there are any; or, exponential, over all channels j with weights
// rho^|c - j|.
struct ChannelProblem {
  Dtype dtype = Dtype::float32;
  int64_t outer = 0, channels = 0, inner = 1;
  bool exponential = false;
  int64_t before = 0, after = 0;  // each less than the channels
  bool squared = false;           // n is x^2

  int64_t numel() const { return outer * channels * inner; }
  Dtype compute() const { return compute_dtype(dtype); }
};

enum Scalar : int { kScalarK, kScalarA, kScalarBeta, kScalarRho, kScalars };

// k, a, beta and rho: numbers, or where one is NaN what `learned`, four numbers in the type of the sums beside x, has
// in its place.
struct ChannelScalars {
  double value[kScalars] = {};
  const void* learned = nullptr;

  bool learns(Scalar which) const { return std::isnan(value[which]); }
};

struct ChannelForward {
  const void* x = nullptr;
  ChannelScalars scalars;
  void* y = nullptr;
};

// dlearned: four numbers in the type of the sums; zero for those that are not learned.
struct ChannelBackward {
  const void* x = nullptr;
  const void* dy = nullptr;
  ChannelScalars scalars;
  void* dx = nullptr;        // null: not wanted
  void* dlearned = nullptr;  // null: not wanted
};

}  // namespace divnorm
