// Sums over a field's window on the small maps: separable, one axis after the other, each from the values themselves
// (no running or prefix sums), so nothing drifts or cancels and a NaN stays inside its windows.
// A window of k costs k additions up to kDirect and about 2 sqrt(k) beyond: first sums of about sqrt(k) neighbours,
// then sums of those.
#pragma once

#include <cmath>

#include "../problem.h"
#include "simd.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kDirect = 8;

// out[i] (+)= source[i] + source[i + stride] + ... (Terms of them)
template <int Terms, bool Add, class A>
inline void sum_terms(const A* __restrict source, int64_t stride, int64_t count, A* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    A sum = source[i];
    for (int t = 1; t < Terms; ++t) sum += source[i + t * stride];
    out[i] = Add ? out[i] + sum : sum;
  }
}

template <bool Add, class A>
inline void sum_terms(int64_t terms, const A* source, int64_t stride, int64_t count, A* out) {
  switch (terms) {
    case 1: return sum_terms<1, Add>(source, stride, count, out);
    case 2: return sum_terms<2, Add>(source, stride, count, out);
    case 3: return sum_terms<3, Add>(source, stride, count, out);
    case 4: return sum_terms<4, Add>(source, stride, count, out);
    case 5: return sum_terms<5, Add>(source, stride, count, out);
    case 6: return sum_terms<6, Add>(source, stride, count, out);
    case 7: return sum_terms<7, Add>(source, stride, count, out);
    default: return sum_terms<8, Add>(source, stride, count, out);
  }
}

// The same for any number of terms, eight at a time; add: onto what out holds.
template <class A>
void sum_strided(int64_t terms, const A* source, int64_t stride, int64_t count, bool add, A* out) {
  for (int64_t done = 0; done < terms; done += kDirect) {
    const int64_t now = terms - done < kDirect ? terms - done : kDirect;
    if (add || done > 0)
      sum_terms<true>(now, source + done * stride, stride, count, out);
    else
      sum_terms<false>(now, source + done * stride, stride, count, out);
  }
  if (terms <= 0 && !add)
    for (int64_t i = 0; i < count; ++i) out[i] = 0;
}

inline int64_t block_length(int64_t window) {
  if (window <= kDirect) return 1;
  return static_cast<int64_t>(std::sqrt(static_cast<double>(window)));
}

// Sum of a whole line, kept in eight lanes of double.
template <class A>
double sum_line(const A* line, int64_t count) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] += line[i + j];
  for (int j = 0; i < count; ++i, ++j) lanes[j] += line[i];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// Box sums of a field over maps of shape extent, walked along the outermost axis. One object per thread: it owns
// scratch of scratch_size() numbers.
template <class A>
class Box {
 public:
  // Mirrored: the field of the adjoint.
  Box(const Problem& problem, const Field& field, bool mirrored) {
    for (int a = 0; a < kAxes; ++a) {
      axis_[a].extent = problem.extent[a];
      axis_[a].lo = mirrored ? field.hi[a] : field.lo[a];
      axis_[a].hi = mirrored ? field.lo[a] : field.hi[a];
      axis_[a].block = block_length(axis_[a].window());
    }
  }

  // Numbers of scratch that rows() needs for at most `rows` outer rows.
  static int64_t scratch_size(const Problem& problem, const Field& field, int64_t rows) {
    const int64_t line = problem.extent[2], plane = problem.extent[1] * line;
    const auto span = [&](int a) { return field.lo[a] + field.hi[a]; };
    return (rows + span(0)) * plane + (problem.extent[1] + span(1)) * line + 2 * (line + span(2)) + 3 * plane;
  }

  // For each outer row i of begin..end: body(i, line) with line[j] the sum over the field around (i, j).
  // source(i) is the address of outer row i; rows within the field's reach must be valid.
  template <class Source, class Body>
  void rows(int64_t begin, int64_t end, Source&& source, A* scratch, Body&& body) const {
    const int64_t plane = axis_[1].extent * axis_[2].extent;
    A* outer = scratch;
    A* inner = outer + (end - begin + axis_[0].lo + axis_[0].hi) * plane + plane;
    if (plane == 0) return;
    along(axis_[0], plane, begin, end, source, outer, [&](int64_t i, A* sums) {
      if (axis_[1].extent == 1)
        line_sums(sums, inner);
      else
        plane_sums(sums, inner);
      body(i, static_cast<const A*>(sums));
    });
  }

 private:
  struct Axis {
    int64_t extent = 1, lo = 0, hi = 0, block = 1;
    int64_t window() const { return lo + hi + 1; }
    bool whole() const { return extent > 1 && lo >= extent - 1 && hi >= extent - 1; }
  };

  // Sums along one axis whose rows are `width` numbers wide, for rows begin..end. Scratch: end - begin + window rows.
  template <class Source, class Body>
  static void along(const Axis& axis, int64_t width, int64_t begin, int64_t end, Source&& source, A* scratch,
                    Body&& body) {
    A* sums = scratch;  // one row, then the block sums
    if (axis.whole()) {
      A* total = scratch + width;
      sum_rows(source, 0, axis.extent, width, total);
      for (int64_t i = begin; i < end; ++i) {
        __builtin_memcpy(sums, total, width * sizeof(A));
        body(i, sums);
      }
      return;
    }
    const auto clipped = [&](int64_t from, int64_t to, A* out, bool add) {
      from = from < 0 ? 0 : from;
      to = to > axis.extent ? axis.extent : to;
      if (to > from || !add) sum_strided(to - from, source(from), width, width, add, out);
    };
    if (axis.block == 1) {
      for (int64_t i = begin; i < end; ++i) {
        clipped(i - axis.lo, i + axis.hi + 1, sums, false);
        body(i, sums);
      }
      return;
    }
    // blocks[r] = sum of rows r .. r + block - 1, for r from begin - lo on
    A* blocks = scratch + width;
    const int64_t first = begin - axis.lo, whole = axis.window() / axis.block, rest = whole * axis.block;
    for (int64_t r = first; r < end - axis.lo + (whole - 1) * axis.block; ++r)
      clipped(r, r + axis.block, blocks + (r - first) * width, false);
    for (int64_t i = begin; i < end; ++i) {
      sum_strided(whole, blocks + (i - begin) * width, axis.block * width, width, false, sums);
      clipped(i - axis.lo + rest, i + axis.hi + 1, sums, true);
      body(i, sums);
    }
  }

  template <class Source>
  static void sum_rows(Source&& source, int64_t begin, int64_t end, int64_t width, A* out) {
    sum_strided(end - begin, source(begin), width, width, false, out);
  }

  // In place: a plane of extent[1] lines.
  void plane_sums(A* plane, A* scratch) const {
    const int64_t line = axis_[2].extent, lines = axis_[1].extent;
    A* result = scratch;
    A* rows_scratch = result + line * lines;
    A* line_scratch = rows_scratch + (lines + axis_[1].lo + axis_[1].hi + 1) * line;
    along(
        axis_[1], line, 0, lines, [&](int64_t i) { return plane + i * line; }, rows_scratch,
        [&](int64_t i, A* sums) {
          line_sums(sums, line_scratch);
          __builtin_memcpy(result + i * line, sums, line * sizeof(A));
        });
    __builtin_memcpy(plane, result, line * lines * sizeof(A));
  }

  // In place: one line. Scratch: twice the line and its margins.
  void line_sums(A* line, A* scratch) const {
    const Axis& axis = axis_[2];
    const int64_t window = axis.window();
    if (window == 1) return;
    if (axis.whole()) {
      const A total = static_cast<A>(sum_line(line, axis.extent));
      for (int64_t j = 0; j < axis.extent; ++j) line[j] = total;
      return;
    }
    A* padded = scratch;
    for (int64_t j = 0; j < axis.lo; ++j) padded[j] = 0;
    __builtin_memcpy(padded + axis.lo, line, axis.extent * sizeof(A));
    for (int64_t j = 0; j < axis.hi; ++j) padded[axis.lo + axis.extent + j] = 0;
    if (axis.block == 1) return sum_strided(window, padded, 1, axis.extent, false, line);
    A* blocks = padded + axis.extent + axis.lo + axis.hi;
    const int64_t whole = window / axis.block, rest = whole * axis.block;
    sum_strided(axis.block, padded, 1, axis.extent + (whole - 1) * axis.block, false, blocks);
    sum_strided(whole, blocks, axis.block, axis.extent, false, line);
    sum_strided(window - rest, padded + rest, 1, axis.extent, true, line);
  }

  Axis axis_[kAxes];
};

}  // namespace divnorm::DIVNORM_ISA
