// Parameters come in dtypes of their own; kernels see them in the type of the statistics.
#pragma once

#include <cmath>
#include <limits>

#include "traversal.h"

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

// The number in the type of the statistics; a NaN is `of_nan`, by itself one without payload, as the rounding to
// bfloat16 needs it.
template <class A>
A quiet(double value, A of_nan = std::numeric_limits<A>::quiet_NaN()) {
  return value == value ? static_cast<A>(value) : of_nan;
}

// `count` numbers of a parameter of that many elements or of one, number i at place(i); `absent` where there is no
// parameter, and `of_nan` where it has a NaN.
template <class A>
class Values {
 public:
  template <class Place>
  [[gnu::noinline]] Values(const Parameter& p, int64_t count, A absent, const Place& place,
                           A of_nan = std::numeric_limits<A>::quiet_NaN())
      : values_(count) {
    for (int64_t i = 0; i < count; ++i) {
      const bool given = p.data != nullptr;
      values_.data()[place(i)] = given ? quiet<A>(read_number(p, p.count == 1 ? 0 : i), of_nan) : absent;
    }
  }
  Values(const Parameter& p, int64_t count, A absent) : Values(p, count, absent, [](int64_t i) { return i; }) {}
  const A* data() const { return values_.data(); }

 private:
  Buffer<A> values_;
};

// 1 / sqrt(sigma^2 + q). The sum is at least sigma^2, so the result is at most 1 / |sigma|: a sigma whose square is too
// small for A still counts, since that square is never rounded up. The squares of x that make q have no such help: in
// float32 a deviation under 1e-19 counts as little or nothing, one above 1e19 as infinite.
template <class A>
class InverseDeviation {
 public:
  explicit InverseDeviation(A sigma) : square_(sigma * sigma), most_(1 / std::fabs(sigma)) {
    if (square_ < std::numeric_limits<A>::min()) square_ = std::nextafter(square_, A(0));
  }
  A operator()(A q) const {
    const A rstd = 1 / std::sqrt(square_ + q);
    return rstd > most_ ? most_ : rstd;  // a NaN stays
  }

 private:
  A square_, most_;
};

// The same for p = 1: 1 / (|sigma| + q).
template <class A>
class InverseMeanDeviation {
 public:
  explicit InverseMeanDeviation(A sigma) : magnitude_(std::fabs(sigma)) {}
  A operator()(A q) const { return 1 / (magnitude_ + q); }

 private:
  A magnitude_;
};

// What the sums over one line are divided by.
template <class A>
struct LineDivisors {
  A outer;
  const A* along;
  A operator[](int64_t j) const { return outer * along[j]; }
};

// What a field's sums are divided by to be averages, axis by axis, for the length of a call. A division, not a product
// with an inverse, makes the mean of equal numbers that number wherever their sum is exact. Inverse: for what may round
// once more, factors instead.
template <class A>
class Divisors {
 public:
  [[gnu::noinline]] Divisors(const Problem& problem, const Field& field, bool inverse = false)
      : numbers_(field.present ? problem.extent[0] + problem.extent[1] + problem.extent[2] : 0) {
    A* next = numbers_.data();
    for (int a = 0; a < kAxes; ++a) {
      axis_[a] = next;
      if (!field.present) continue;
      const int64_t extent = problem.extent[a];
      const auto divisor = [&](int64_t p) {
        const int64_t count = smaller(p + field.hi[a], extent - 1) - larger(p - field.lo[a], 0) + 1;
        const A divisor = static_cast<A>(field.divisor[a] > 0 ? field.divisor[a] : count);
        return inverse ? 1 / divisor : divisor;
      };
      // Between these the window is inside, and the divisor the same: a long row takes no division a position.
      const int64_t first = smaller(field.lo[a], extent), end = larger(first, extent - field.hi[a]);
      for (int64_t p = 0; p < first; ++p) next[p] = divisor(p);
      const A inside = first < end ? divisor(first) : A(0);
      for (int64_t p = first; p < end; ++p) next[p] = inside;
      for (int64_t p = end; p < extent; ++p) next[p] = divisor(p);
      next += extent;
    }
  }

  // Over line h of outer row i.
  LineDivisors<A> line(int64_t i, int64_t h) const { return {axis_[0][i] * axis_[1][h], axis_[2]}; }

 private:
  Buffer<A> numbers_;
  const A* axis_[kAxes];
};

// Turns `count` sums of a map, from flattened position `first` on, into scale times the field's averages.
template <class A>
void average(const Problem& problem, const Divisors<A>& field, int64_t first, int64_t count, A scale, A* numbers) {
  const int64_t width = problem.extent[2], lines = problem.extent[1];
  while (count > 0) {
    const int64_t line = first / width, column = first % width;
    const int64_t now = count < width - column ? count : width - column;
    const LineDivisors<A> divisors = field.line(line / lines, line % lines);
    for (int64_t j = 0; j < now; ++j) numbers[j] = numbers[j] * scale / divisors[column + j];
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
  A* at(int64_t group, int64_t position) const { return row(group, 0) + position; }
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
