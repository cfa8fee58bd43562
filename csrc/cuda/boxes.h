// How one copy moves rows that are apart in memory. No CUDA here.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace divnorm::cuda {

constexpr int kBoxAlignment = 128;  // bytes, of a box in shared memory
constexpr int kMostOfBox = 256;     // along each of its axes

// `rows` rows of `stretches` stretches of `width` numbers each, one behind the other in shared memory. Of several
// stretches each is as long as those that the tensor's rows then consist of; one alone begins at any number.
struct Boxes {
  int rows = 0, stretches = 0, width = 0;  // rows 0: there are none
};

// Where one begins: `number` is 0 where there are several stretches, else `stretch`.
struct Corner {
  int number, stretch, row;
};

// What boxes are of: rows of `pitch` numbers, one behind the other.
struct BoxedTensor {
  const void* first = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t rows = 0, pitch = 0;
  Boxes box;

  int64_t stretch() const { return box.stretches > 1 ? box.width : pitch; }  // numbers of one of its rows' stretches
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
