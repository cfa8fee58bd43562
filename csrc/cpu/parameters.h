// Parameters come in dtypes of their own; kernels see them in the type of the statistics.
#pragma once

#include <limits>

#include "threads.h"
#include "unit.h"

namespace divnorm::DIVNORM_ISA {

inline double read_number(const Parameter& p, int64_t i) {
  switch (p.dtype) {
    case Dtype::float64: return static_cast<const double*>(p.data)[i];
    case Dtype::float32: return static_cast<const float*>(p.data)[i];
    case Dtype::bfloat16: return load<float>(static_cast<const BFloat16*>(p.data) + i);
    default: return load<float>(static_cast<const Float16*>(p.data) + i);
  }
}

inline void write_number(const Parameter& p, int64_t i, double value) {
  switch (p.dtype) {
    case Dtype::float64: static_cast<double*>(p.data)[i] = value; break;
    case Dtype::float32: static_cast<float*>(p.data)[i] = static_cast<float>(value); break;
    case Dtype::bfloat16: store(static_cast<BFloat16*>(p.data) + i, static_cast<float>(value)); break;
    default: store(static_cast<Float16*>(p.data) + i, static_cast<float>(value)); break;
  }
}

// `count` numbers of a parameter of that many elements or of one; `absent` where there is no parameter.
template <class A>
class Values {
 public:
  Values(const Parameter& p, int64_t count, A absent) : values_(count) {
    for (int64_t i = 0; i < count; ++i)
      values_.data()[i] = p.data == nullptr ? absent : quiet(read_number(p, p.count == 1 ? 0 : i));
  }
  const A* data() const { return values_.data(); }

 private:
  static A quiet(double value) { return value == value ? static_cast<A>(value) : std::numeric_limits<A>::quiet_NaN(); }

  Buffer<A> values_;
};

template <class A>
const A* divisors(const Field& field, int axis) {
  if constexpr (sizeof(A) == sizeof(double))
    return field.divisor64[axis];
  else
    return field.divisor32[axis];
}

// Turns `count` sums of a map, from flattened position `first` on, into scale times the field's averages. A division,
// so that the mean of equal numbers is that number wherever their sum is exact.
template <class A>
void average(const Problem& problem, const Field& field, int64_t first, int64_t count, A scale, A* numbers) {
  const int64_t line = problem.extent[2], lines = problem.extent[1];
  while (count > 0) {
    const int64_t row = first / line, column = first % line;
    const int64_t now = count < line - column ? count : line - column;
    const A outer = divisors<A>(field, 0)[row / lines] * divisors<A>(field, 1)[row % lines];
    const A* along = divisors<A>(field, 2) + column;
    for (int64_t i = 0; i < now; ++i) numbers[i] = numbers[i] * scale / (outer * along[i]);
    numbers += now;
    first += now;
    count -= now;
  }
}

// The rows of a team's scratch maps: a window of the unit's rows that slides with the traversal.
template <class A>
struct SlidingMap {
  A* base = nullptr;
  int64_t line = 0, capacity_rows = 0;
  int64_t first_row = 0;

  A* row(int64_t group, int64_t i) const { return base + (group * capacity_rows + i - first_row) * line; }
  operator Map<A>() const { return {base, capacity_rows * line, first_row * line, false}; }
  operator Map<const A>() const { return Map<A>(*this); }

  // Drops the rows before keep_row; rows up to `end` are held. `move`: this thread moves the numbers too.
  void slide(int64_t groups, int64_t keep_row, int64_t end, bool move) {
    if (keep_row <= first_row) return;
    for (int64_t group = 0; move && group < groups; ++group)
      __builtin_memmove(row(group, first_row), row(group, keep_row), (end - keep_row) * line * sizeof(A));
    first_row = keep_row;
  }
};

}  // namespace divnorm::DIVNORM_ISA
