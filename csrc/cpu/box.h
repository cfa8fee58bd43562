// Sums over a field's window on the small maps: separable, one axis after the other, each from the values themselves
// (no running or prefix sums), so nothing drifts or cancels and a NaN stays inside its windows.
// A window of k costs k additions up to kDirect and about 2 sqrt(k) beyond: first sums of about sqrt(k) neighbours,
// then sums of those.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "../problem.h"
#include "lanes.h"
#include "threads.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kDirect = 8;
constexpr int64_t kChunkNumbers = 4096;

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

// Scratch of box sums: what is laid out and what has been summed, in turns, and first sums.
template <class A>
using BoxBuffers = std::array<A*, 3>;

// Box sums of a field over maps of shape extent. Chunks of outer rows are laid out with zeros between their lines and
// planes, so that on each axis all sums of a chunk are one loop, whatever the lengths of its lines; what a window finds
// outside the image is zero. An axis that every window covers is summed once instead.
template <class A>
class Box {
 public:
  // Mirrored: the field of the adjoint.
  Box(const Problem& problem, const Field& field, bool mirrored) {
    for (int a = 0; a < kAxes; ++a) {
      const int64_t extent = problem.extent[a];
      const bool whole = extent > 1 && field.lo[a] >= extent - 1 && field.hi[a] >= extent - 1;
      axis_[a] = {extent, mirrored ? field.hi[a] : field.lo[a], mirrored ? field.lo[a] : field.hi[a], whole};
    }
    pitch_ = axis_[2].extent + axis_[2].gap();
    plane_ = (axis_[1].extent + axis_[1].gap()) * pitch_;
  }

  // Numbers that each of the buffers of lines() must hold.
  int64_t buffer_size() const { return front() + (chunk_rows() + axis_[0].span()) * plane_ + tail(); }

  // For each line h of each outer row i of begin..end: body(i, h, sums) with sums[j] the sum over the field around
  // (i, h, j). source(i) is the address of outer row i; rows within the field's reach must be valid, and follow each
  // other where every window covers all of them.
  template <class Source, class Body>
  void lines(int64_t begin, int64_t end, Source&& source, const BoxBuffers<A>& buffers, Body&& body) const {
    const int64_t step = axis_[0].whole ? end - begin : chunk_rows();
    for (int64_t from = begin; from < end; from += step) {
      const int64_t to = from + step < end ? from + step : end;
      if (axis_[0].whole) {
        const int64_t plane = axis_[1].extent * axis_[2].extent;
        A* total = buffers[2];
        sum_strided(axis_[0].extent, source(0), plane, plane, false, total);
        lay_out(0, 1, [&](int64_t) { return static_cast<const A*>(total); }, buffers[0]);
      } else {
        lay_out(from - axis_[0].lo, to + axis_[0].hi, source, buffers[0]);
      }
      const A* sums = filter(axis_[0].whole ? 1 : to - from, buffers);
      for (int64_t i = from; i < to; ++i)
        for (int64_t h = 0; h < axis_[1].extent; ++h)
          body(i, h, sums + (axis_[0].whole ? 0 : i - from) * plane_ + h * pitch_);
    }
  }

 private:
  struct Axis {
    int64_t extent = 1, lo = 0, hi = 0;
    bool whole = false;

    int64_t window() const { return lo + hi + 1; }
    // Zeros before the first number and between neighbours that share them.
    int64_t front() const { return whole ? 0 : lo; }
    int64_t gap() const { return whole ? 0 : lo > hi ? lo : hi; }
    int64_t span() const { return whole ? 0 : lo + hi; }
  };

  // Rows a chunk gives sums for: enough for the first-level cache, and for what is laid out twice to be the lesser
  // part.
  int64_t chunk_rows() const {
    const int64_t fitting = kChunkNumbers / plane_, worthwhile = 2 * axis_[0].span();
    const int64_t rows = fitting > worthwhile ? fitting : worthwhile;
    return rows < 1 ? 1 : rows < axis_[0].extent ? rows : axis_[0].extent;
  }
  int64_t front() const { return axis_[1].front() * pitch_ + axis_[2].front(); }
  int64_t tail() const { return axis_[1].span() * pitch_ + axis_[2].span(); }

  static A* zero(A* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = 0;
    return out + count;
  }

  // Outer rows first..last with their zeros.
  template <class Source>
  void lay_out(int64_t first, int64_t last, Source&& source, A* out) const {
    const int64_t line = axis_[2].extent, lines = axis_[1].extent;
    out = zero(out, front());
    for (int64_t i = first; i < last; ++i) {
      if (i < 0 || i >= axis_[0].extent) {
        out = zero(out, plane_);
        continue;
      }
      const A* in = source(i);
      for (int64_t h = 0; h < lines; ++h) {
        __builtin_memcpy(out, in + h * line, line * sizeof(A));
        out = zero(out + line, pitch_ - line);
      }
      out = zero(out, plane_ - lines * pitch_);
    }
    zero(out, tail());
  }

  // The sums of `rows` rows laid out in buffers[0], one axis after the other; returns where they start.
  const A* filter(int64_t rows, const BoxBuffers<A>& buffers) const {
    A *in = buffers[0], *out = buffers[1];
    const int64_t count = rows * plane_, front = axis_[2].front();
    const auto swap = [&] {
      A* other = in;
      in = out;
      out = other;
    };
    if (!axis_[0].whole && axis_[0].window() > 1) {
      A* sums = zero(out, this->front());
      windows(axis_[0], plane_, count, in + this->front(), buffers[2], sums);
      zero(sums + count, tail());
      swap();
    }
    if (axis_[1].whole) {
      for (int64_t r = 0; r < rows; ++r) total_of_lines(in + front + r * plane_, buffers[2]);
    } else if (axis_[1].window() > 1) {
      A* sums = zero(out, front);
      windows(axis_[1], pitch_, count, in + front, buffers[2], sums);
      zero(sums + count, axis_[2].span());
      swap();
    }
    if (axis_[2].whole) {
      for (A* line = in; line < in + count; line += pitch_) {
        const A total = static_cast<A>(sum_line(line, axis_[2].extent));
        for (int64_t j = 0; j < axis_[2].extent; ++j) line[j] = total;
      }
    } else if (axis_[2].window() > 1) {
      windows(axis_[2], 1, count, in, buffers[2], out);
      swap();
    }
    return in;
  }

  // out[i] = in[i] + in[i + stride] + ... over the axis' window
  static void windows(const Axis& axis, int64_t stride, int64_t count, const A* in, A* blocks, A* out) {
    const int64_t window = axis.window(), block = block_length(window), whole = window / block, rest = whole * block;
    if (block == 1) return sum_strided(window, in, stride, count, false, out);
    sum_strided(block, in, stride, count + (whole - 1) * block * stride, false, blocks);
    sum_strided(whole, blocks, block * stride, count, false, out);
    sum_strided(window - rest, in + rest * stride, stride, count, true, out);
  }

  // In place: every line of a plane becomes the sum of all of them.
  void total_of_lines(A* plane, A* total) const {
    sum_strided(axis_[1].extent, plane, pitch_, axis_[2].extent, false, total);
    for (int64_t h = 0; h < axis_[1].extent; ++h)
      __builtin_memcpy(plane + h * pitch_, total, axis_[2].extent * sizeof(A));
  }

  Axis axis_[kAxes];
  int64_t pitch_ = 0, plane_ = 0;  // from one line, one outer row to the next as laid out
};

// The boxes of a pass, and buffers for each of its threads that are large enough for both.
template <class A>
class Boxes {
 public:
  Boxes(const Problem& problem, bool mirrored, int threads)
      : summation(problem, problem.summation, mirrored),
        suppression(problem, problem.suppression, mirrored),
        size_(std::max(summation.buffer_size(), suppression.buffer_size())),
        memory_{threads * size_, threads * size_, threads * size_} {}

  BoxBuffers<A> buffers(int thread) const {
    const int64_t offset = thread * size_;
    return {memory_[0].data() + offset, memory_[1].data() + offset, memory_[2].data() + offset};
  }

  const Box<A> summation, suppression;

 private:
  int64_t size_;
  Buffer<A> memory_[3];
};

}  // namespace divnorm::DIVNORM_ISA
