#include "problem.h"

#include <algorithm>
#include <stdexcept>

namespace divnorm {
namespace {

void clip(Field& field, const int64_t* extent) {
  for (int a = 0; field.present && a < kAxes; ++a) {
    if (field.lo[a] < 0 || field.hi[a] < 0 || field.divisor[a] < 0)
      throw std::invalid_argument("a field reaches backwards");
    // Beyond the extent there is nothing left to reach.
    field.lo[a] = std::min(field.lo[a], extent[a] - 1);
    field.hi[a] = std::min(field.hi[a], extent[a] - 1);
  }
}

}  // namespace

Problem checked(Problem problem) {
  if (problem.groups < 1 || problem.channels % problem.groups != 0)
    throw std::invalid_argument("groups must divide channels");
  if (problem.affine_per_position && problem.channels != 1)
    throw std::invalid_argument("the feature form has one channel");
  if (problem.numel() < 1) throw std::invalid_argument("a call needs at least one element");
  if (problem.p != 1 && problem.p != 2) throw std::invalid_argument("p: kernels have 1 and 2");
  clip(problem.summation, problem.extent);
  clip(problem.suppression, problem.extent);
  return problem;
}

}  // namespace divnorm
