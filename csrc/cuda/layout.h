// Where one thing lies behind the other: in a block's shared memory, in the scratch memory of a call.
#pragma once

#include <algorithm>
#include <limits>

#include "shape.h"

namespace divnorm::cuda {

constexpr int64_t kAlignment = 256;  // of what lies in scratch memory

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int as_int(int64_t number) {
  return static_cast<int>(std::min<int64_t>(number, std::numeric_limits<int>::max()));
}

// Maps of a tile start at multiples of this.
constexpr int kPitchNumbers = 8;
inline int64_t pitch_of(int64_t positions) { return round_up(positions, kPitchNumbers); }

class SharedPlan {
 public:
  int add(int64_t bytes, int64_t alignment = kVectorBytes) {
    const int64_t offset = round_up(bytes_, alignment);
    bytes_ = offset + round_up(bytes, kVectorBytes);
    return as_int(offset);
  }
  int bytes() const { return as_int(bytes_); }

 private:
  int64_t bytes_ = 0;
};

// `numbers` of each of a block's parameters, and of those whose gradient it collects `gradients`, in `sum` bytes each.
inline void add_parameters(SharedPlan& plan, SharedLayout& at, const Shape& shape, bool backward, int64_t numbers,
                           int64_t gradients, int sum) {
  at.weight = plan.add(numbers * sum);
  const bool biased = !backward || shape.activation != Activation::none;  // its slope depends on z
  at.bias = biased ? plan.add(numbers * sum) : -1;
  at.threshold = has_thresholds(shape) ? plan.add(numbers * sum) : -1;
  at.dweight = backward ? plan.add(gradients * sum) : -1;
  at.dbias = backward ? plan.add(gradients * sum) : -1;
  at.dthreshold = backward && learns_thresholds(shape) ? plan.add(gradients * sum) : -1;
}

class ScratchPlan {
 public:
  int64_t add(int64_t bytes) {
    const int64_t offset = round_up(bytes_, kAlignment);
    bytes_ = offset + bytes;
    return offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

}  // namespace divnorm::cuda
