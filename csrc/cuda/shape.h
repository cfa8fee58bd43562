// A call as the kernels see it before it is cut: shape, windows and the passes that sum over them. No CUDA here.
#pragma once

#include <algorithm>

#include "program.h"

namespace divnorm::cuda {

constexpr int64_t kMostPositions = 1 << 30;  // and channels, and samples: they are counted in int

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int log2_up(int64_t number);

Divider divider(int64_t divisor);

Shape shape_of(const Problem& problem, Direction direction);

// Whether thresholds are parameters, which have a gradient; a ReLU's are not.
inline bool learns_thresholds(const Shape& shape) { return shape.activation == Activation::tlu; }
inline bool has_thresholds(const Shape& shape) {
  return learns_thresholds(shape) || (shape.activation == Activation::relu && shape.form == Form::general);
}

// Positions of a slice of them: whole accesses of the widest kind where the image has them, of elements of so many
// bytes.
inline int64_t aligned_positions(const Shape& shape, int64_t positions, int element) {
  const int64_t widest = std::max(1, kVectorBytes / element);
  if (shape.positions % widest == 0) positions = ceil_div(positions, widest) * widest;
  return std::min<int64_t>(positions, shape.positions);
}

// How each pass sums, where so many blocks of threads share it, each with so many positions. Window by window a thread
// makes a load for every position of its windows; going through stretches as long as the window about four for every
// position of them, one after the other. So the number of a thread's windows and stretches decides, whatever the
// window.
void choose_kinds(Shape& shape, int64_t positions, int64_t threads, int64_t blocks, int64_t window_rounds);

}  // namespace divnorm::cuda
