// A checked Problem: one plan serves every call of the same geometry and dtype. It is kept for long, so it holds
// nothing that grows with the extents.
#pragma once

#include <array>
#include <optional>

#include "problem.h"

namespace divnorm {

// One axis of a field: positions p-lo..p+hi. divisor 0: the average divides by the positions inside the image.
struct Axis {
  int64_t lo, hi, divisor;
};
using Axes = std::array<Axis, kAxes>;

class Plan {
 public:
  Plan(Dtype dtype, bool channels_last, bool over_batch, bool affine_per_position, bool relu, bool whole, int64_t batch,
       int64_t channels, int64_t groups, std::array<int64_t, kAxes> extent, std::optional<Axes> summation,
       std::optional<Axes> suppression);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  const Problem& problem() const { return problem_; }

 private:
  void fill(Field& field, const std::optional<Axes>& axes);

  Problem problem_;
};

}  // namespace divnorm
