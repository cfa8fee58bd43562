// How one copy moves rows that are apart in memory. No CUDA here.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace divnorm::cuda {

constexpr int kBoxAlignment = 128;  // bytes, of a box in shared memory
constexpr int kBoxWord = 8;         // bytes, of what boxes are counted in, whatever numbers they hold
constexpr int kMostOfBox = 256;     // words of a row, and rows

// `rows` rows of so many bytes, one behind the other in shared memory.
struct Boxes {
  int rows = 0, row_bytes = 0;  // rows 0: there are none
};

// Where one begins.
struct Corner {
  int word, row;
};

// What boxes are of: rows of `pitch` bytes, one behind the other.
struct BoxedTensor {
  const void* first = nullptr;
  int64_t rows = 0, pitch = 0;
  Boxes box;
};

// The same in the driver's own terms, which copies are given: made for every call (launch.h).
struct alignas(128) TensorMap {
  uint64_t words[16] = {};
};

// The tensors of a call that may be copied so.
namespace boxed {
enum { x, dy, residual, out, dresidual, count };
}

}  // namespace divnorm::cuda
