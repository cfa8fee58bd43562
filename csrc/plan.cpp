#include "plan.h"

#include <algorithm>
#include <stdexcept>

namespace divnorm {

Plan::Plan(Dtype dtype, bool channels_last, bool over_batch, bool affine_per_position, bool relu, bool whole,
           int64_t batch, int64_t channels, int64_t groups, std::array<int64_t, kAxes> extent,
           std::optional<Axes> summation, std::optional<Axes> suppression) {
  if (groups < 1 || channels % groups != 0) throw std::invalid_argument("groups must divide channels");
  if (affine_per_position && channels != 1) throw std::invalid_argument("the feature form has one channel");
  problem_.dtype = dtype;
  problem_.channels_last = channels_last;
  problem_.over_batch = over_batch;
  problem_.affine_per_position = affine_per_position;
  problem_.relu = relu;
  problem_.whole = whole;
  problem_.batch = batch;
  problem_.channels = channels;
  problem_.groups = groups;
  std::copy(extent.begin(), extent.end(), problem_.extent);
  if (problem_.numel() < 1) throw std::invalid_argument("a plan needs at least one element");
  fill(problem_.summation, summation);
  fill(problem_.suppression, suppression);
}

void Plan::fill(Field& field, const std::optional<Axes>& axes) {
  if (!axes) return;
  field.present = true;
  for (int a = 0; a < kAxes; ++a) {
    const int64_t extent = problem_.extent[a];
    const Axis& axis = (*axes)[a];
    if (axis.lo < 0 || axis.hi < 0 || axis.divisor < 0) throw std::invalid_argument("a field reaches backwards");
    // Beyond the extent there is nothing left to reach.
    field.lo[a] = std::min(axis.lo, extent - 1);
    field.hi[a] = std::min(axis.hi, extent - 1);
    field.divisor[a] = axis.divisor;
  }
}

}  // namespace divnorm
