// What stands around the matrix products of a generalized divisive normalization: y = x f(D), D = beta + gamma S, where
// S is x^2 and f the reciprocal root, or simplified |x| and the reciprocal; inverse, they multiply.
#pragma once

#include <cstdint>

#include "problem.h"

namespace divnorm {

// Some of x's numbers, `blocks` of `rows` of `columns`, which lie side by side, and their places in two kinds of
// tensor: those like x, and scratch in the type of the sums.
struct GdnPart {
  Dtype dtype = Dtype::float32;
  bool inverse = false, simplified = false;
  int64_t tensor_numel = 0;  // of all of x: of large tensors what is written goes past the cache
  int64_t blocks = 0, rows = 0, columns = 0;
  int64_t block_stride = 0, row_stride = 0;
  int64_t scratch_block_stride = 0, scratch_row_stride = 0;

  int64_t numel() const { return blocks * rows * columns; }
};

// The passes, of every instruction set its own. Pointers are to the part's first numbers; in order, those to tensors
// like x and those to scratch.
struct GdnKernels {
  // s = S
  void (*pool)(const GdnPart&, int threads, const void* x, void* s);
  // y = x f(D)
  void (*forward)(const GdnPart&, int threads, const void* x, void* y, const void* d);
  // e = dy f(D) and dd, the gradient of D; d and e may be the same
  void (*slope)(const GdnPart&, int threads, const void* dy, const void* x, const void* d, void* e, void* dd);
  // The same and S, of tensors in the type of the sums, from f(D) = y / x. False, and nothing of use, where an x or a y
  // is no normal number and does not tell.
  bool (*slope_of_result)(const GdnPart&, int threads, const void* dy, const void* x, const void* y, void* s, void* e,
                          void* dd);
  // dx from e and ds, the gradient of S
  void (*backward)(const GdnPart&, int threads, const void* x, void* dx, const void* e, const void* ds);
};

}  // namespace divnorm
