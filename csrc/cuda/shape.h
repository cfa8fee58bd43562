// A call as the kernels see it before it is cut: shape, windows and the passes that sum over them. No CUDA here.
#pragma once

#include "program.h"

namespace divnorm::cuda {

constexpr int64_t kMostPositions = 1 << 30;  // and channels, and samples: they are counted in int

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int log2_up(int64_t number);

Divider divider(int64_t divisor);

Shape shape_of(const Problem& problem, Direction direction);

// How each pass sums, where so many blocks of threads share it, each with so many positions. Window by window a thread
// makes a load for every position of its windows; going through stretches as long as the window about four for every
// position of them, one after the other. So the number of a thread's windows and stretches decides, whatever the
// window.
void choose_kinds(Shape& shape, int64_t positions, int64_t threads, int64_t blocks, int64_t window_rounds);

}  // namespace divnorm::cuda
