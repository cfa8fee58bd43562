// The work on the maps, one number per position: window sums axis by axis, and what is made of them. Nothing is ever
// subtracted, so nothing drifts and a NaN stays inside its windows.
#pragma once

#include <cmath>

#include "numbers.h"
#include "program.h"
#include "team.h"

namespace divnorm::cuda {

// One of several workers that share a pass; warps of workers are whole.
struct Worker {
  int index, count;
};

// The positions that a thread takes: first, first + step, ... below end.
struct Positions {
  int first, end, step;
};

__device__ inline int clamped(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

__device__ inline int quotient(const Divider& divider, int number) {
  return static_cast<int>((uint64_t{divider.multiplier} * (2u * static_cast<uint32_t>(number)) >> 32) >> divider.shift);
}

// What the average over the field divides by at position p.
template <class A>
__device__ A divisor(const Shape& shape, const Window& window, int p) {
  int inside = 1;
  for (int a = kAxes - 1; a >= 0; --a) {
    if (shape.extent[a] == 1) continue;
    const int rest = quotient(shape.by_extent[a], p), at = p - rest * shape.extent[a],
              beyond = shape.extent[a] - 1 - at;
    const int before = at < window.lo[a] ? at : window.lo[a], behind = beyond < window.hi[a] ? beyond : window.hi[a];
    if (window.counted[a]) inside *= before + 1 + behind;
    p = rest;
  }
  return static_cast<A>(window.divisor) * static_cast<A>(inside);
}

// Window sums by PassKind. They call emit(position, sum) for every position of a map with the sum of the pass' source
// over the window around it.

// A warp sums a line.
template <class A, class Maps, class Emit>
__device__ void line_sums(const Pass& pass, const Maps& maps, Worker worker, Emit&& emit) {
  const int lane = worker.index % device::kWarp, warps = worker.count / device::kWarp;
  for (int line = worker.index / device::kWarp; line < pass.lines; line += warps) {
    const int outer = quotient(pass.by_inner, line);
    const int begin = line + outer * pass.inner * (pass.extent - 1);
    A sum = 0;
    for (int e = lane; e < pass.extent; e += device::kWarp) sum += maps.load(pass.source, begin + e * pass.inner);
    for (int m = device::kWarp / 2; m > 0; m /= 2) sum += device::shuffle_xor(sum, m);
    for (int e = lane; e < pass.extent; e += device::kWarp) emit(begin + e * pass.inner, sum);
  }
}

// A thread sums a window. All of its loads are under way at once.
template <class A, class Maps, class Emit>
__device__ void direct_sums(const Pass& pass, const Maps& maps, Positions positions, Emit&& emit) {
  for (int p = positions.first; p < positions.end; p += positions.step) {
    const int row = quotient(pass.by_inner, p), e = row - quotient(pass.by_extent, row) * pass.extent;
    const int from = clamped(e - pass.lo, 0, e), to = clamped(e + pass.hi, e, pass.extent - 1);
    const int end = p + (to - e) * pass.inner;
    emit(p, maps.sum(pass.source, p - (e - from) * pass.inner, end, pass.inner));
  }
}

// A thread goes through a block as long as the window. Two additions a position whatever that is: the sum of a window
// is the sum of a suffix of one block and of a prefix of the next (van Herk). `target` is written before emit.
template <class A, class Maps, class Emit>
__device__ void block_sums(const Pass& pass, const Maps& maps, Worker worker, Emit&& emit) {
  const int last = pass.extent - 1, length = pass.lo + pass.hi + 1;
  for (int task = worker.index; task < pass.lines * pass.blocks; task += worker.count) {
    const int rest = quotient(pass.by_inner, task), inner = task - rest * pass.inner;
    const int outer = quotient(pass.by_blocks, rest), first = (rest - outer * pass.blocks) * length;
    const int begin = outer * pass.inner * pass.extent + inner;
    const auto position = [&](int e) { return begin + e * pass.inner; };
    const int outputs = clamped(last - first, 0, length - 1);
    A sum = 0;  // of the suffix from first - lo + i of the block that starts at first - lo
    int e = clamped(first - pass.lo + length - 1, -1, last);
    for (const int end = first - pass.lo + outputs; e > end && e >= 0; --e) sum += maps.load(pass.source, position(e));
    for (int i = outputs; i >= 0; --i) {
      const int from = first - pass.lo + i;
      if (from >= 0 && from <= last) sum += maps.load(pass.source, position(from));
      maps.store(pass.target, position(first + i), sum);
    }
    sum = 0;  // of the first i positions of the next block
    for (int i = 0; i <= outputs; ++i) {
      const int p = position(first + i), next = first - pass.lo + length + i;
      emit(p, maps.load(pass.target, p) + sum);
      if (next <= last) sum += maps.load(pass.source, position(next));
    }
  }
}

// What becomes of a pass' sums: the target, or at the end of a field what `fields` makes of them.
template <class A, class Maps, class Fields>
struct Ending {
  const Pass& pass;
  const Maps& maps;
  const Fields& fields;

  __device__ void operator()(int p, A sum) const {
    if (!pass.last)
      maps.store(pass.target, p, sum);
    else if (pass.of_suppression)
      fields.suppression(p, sum);
    else
      fields.summation(p, sum);
  }
};

// Whether every thread of a pass works on positions of its own.
__device__ inline bool by_positions(const Pass& pass) {
  return pass.kind == PassKind::none || pass.kind == PassKind::windows;
}

// One pass of a row.
template <class A, class Maps, class Fields>
__device__ void run_by_positions(const Pass& pass, const Maps& maps, Positions positions, const Fields& fields) {
  const Ending<A, Maps, Fields> emit{pass, maps, fields};
  if (pass.kind == PassKind::windows) return direct_sums<A>(pass, maps, positions, emit);
  for (int p = positions.first; p < positions.end; p += positions.step) emit(p, maps.load(pass.source, p));
}
template <class A, class Maps, class Fields>
__device__ void run_by_lines(const Pass& pass, const Maps& maps, Worker worker, const Fields& fields) {
  const Ending<A, Maps, Fields> emit{pass, maps, fields};
  if (pass.kind == PassKind::lines)
    line_sums<A>(pass, maps, worker, emit);
  else
    block_sums<A>(pass, maps, worker, emit);
}

template <class A>
__device__ A sigma_of(const Tensors& tensors, int group) {
  if (tensors.sigma.data == nullptr) return static_cast<A>(tensors.sigma_value);
  return read<A>(tensors.sigma, tensors.sigma.count == 1 ? 0 : group);
}

// Whether deviations are averages of |v|.
template <Form F>
__device__ bool absolute(const Shape& shape) {
  return F == Form::general && shape.absolute;
}

// 1/s from what B averages. s is never below |sigma|, not even where sigma^2 is below what there is of numbers; a NaN
// stays one.
template <Form F, class A>
__device__ A rstd_of(const Shape& shape, A sigma, A q) {
  if (absolute<F>(shape)) return A(1) / (std::abs(sigma) + A(kDeviationScale) * q);
  const A s = std::sqrt(sigma * sigma + q), least = std::abs(sigma);
  return A(1) / (s < least ? least : s);
}

// mean and rstd of one row, as forward returns and backward receives them.
template <class A>
struct SavedMaps {
  __device__ SavedMaps(const Shape& shape, const Tensors& tensors, int64_t row)
      : mean(static_cast<A*>(tensors.mean) + (shape.summation.present ? row * shape.map_positions : 0)),
        rstd(static_cast<A*>(tensors.rstd) + (shape.suppression.present ? row * shape.map_positions : 0)),
        variance(tensors.variance == nullptr ? nullptr : static_cast<A*>(tensors.variance) + row),
        step(shape.whole ? 0 : 1) {}
  __device__ void store(bool of_mean, int p, A value) const { device::store((of_mean ? mean : rstd) + p, value); }
  A *mean, *rstd;
  A* variance;  // one number; null: not wanted
  int step;     // from one position to the next
};

// The maps of a row in shared memory of a cluster: block p / owned keeps position p. A thread reads and writes what its
// block keeps, and may read the others'.
template <class A>
struct OwnedMaps {
  static constexpr bool kElsewhere = true;  // a number may take a way through the cluster
  A* base;
  int owned, begin;  // positions of a block, and the first of this one
  Divider by_owned;
  SavedMaps<A> saved;

  __device__ bool here(int p) const { return static_cast<unsigned>(p - begin) < static_cast<unsigned>(owned); }
  __device__ A load(int map, int p) const { return base[map * owned + p - begin]; }
  __device__ void store(int map, int p, A value) const { base[map * owned + p - begin] = value; }
  __device__ A anywhere(int map, int p) const { return here(p) ? load(map, p) : elsewhere(map, p); }
  __device__ A elsewhere(int map, int p) const {
    const int block = quotient(by_owned, p);
    const A* address = base + map * owned + p - block * owned;
    return *device::in_block(address, block);
  }
  __device__ void store_anywhere(int map, int p, A value) const {
    const int block = quotient(by_owned, p);
    *device::in_block(base + map * owned + p - block * owned, block) = value;
  }
  // Of positions first, first + step, ... up to last.
  __device__ A sum(int map, int first, int last, int step) const {
    A sum = 0;
    if (here(first) && here(last)) {
#pragma unroll 4
      for (int p = first; p <= last; p += step) sum += load(map, p);
    } else {
#pragma unroll 4
      for (int p = first; p <= last; p += step) sum += elsewhere(map, p);
    }
    return sum;
  }
  __device__ void keep(int map, int p, A value) const { store(map, p, value); }
  __device__ void save(int map, int p, A value) const {
    store(map, p, value);
    saved.store(map == forward_map::mean, p, value);
  }
};

// The same maps to threads that read and write all of them.
template <class A>
struct ClusterMaps {
  const OwnedMaps<A>& owned;

  __device__ A load(int map, int p) const { return owned.anywhere(map, p); }
  __device__ void store(int map, int p, A value) const { owned.store_anywhere(map, p, value); }
  __device__ void keep(int map, int p, A value) const { store(map, p, value); }
  __device__ void save(int map, int p, A value) const {
    store(map, p, value);
    owned.saved.store(map == forward_map::mean, p, value);
  }
};

// The maps of a row in global memory; mean and rstd lie in the results themselves.
template <class A>
struct GlobalMaps {
  static constexpr bool kElsewhere = false;
  A* base;
  int64_t stride;  // from one map to the next
  int scratch;     // maps that are not results
  SavedMaps<A> saved;

  __device__ A* at(int map, int p) const {
    return (map < scratch ? base + map * stride : map == scratch ? saved.mean : saved.rstd) + p;
  }
  __device__ A load(int map, int p) const { return device::load(at(map, p)); }
  __device__ A anywhere(int map, int p) const { return load(map, p); }
  __device__ A sum(int map, int first, int last, int step) const {
    A sum = 0;
#pragma unroll 4
    for (int p = first; p <= last; p += step) sum += load(map, p);
    return sum;
  }
  __device__ void store(int map, int p, A value) const { device::store(at(map, p), value); }
  __device__ void keep(int map, int p, A value) const { store(map, p, value); }
  __device__ void save(int map, int p, A value) const { store(map, p, value); }
};

// mu = A[m]; z = M2/n + (m - mu)^2; rstd = 1 / sqrt(sigma^2 + B[z]). `squares` holds M2/n; for p = 1 what B averages is
// put there when mu is known.
template <Form F, class A, class Maps>
struct ForwardFields {
  const Shape& shape;
  const Maps& maps;
  A sigma;

  __device__ void summation(int p, A sum) const {
    const A mu = sum / divisor<A>(shape, shape.summation, p);
    const A difference = maps.load(forward_map::mean_of_channels, p) - mu;
    maps.store(forward_map::squares, p, maps.load(forward_map::squares, p) + difference * difference);
    maps.save(forward_map::mean, p, mu);
  }
  __device__ void suppression(int p, A sum) const {
    maps.save(forward_map::rstd, p, rstd_of<F>(shape, sigma, sum / divisor<A>(shape, shape.suppression, p)));
  }
};

// slope: a = B'[P2 rstd^3] / n, where `scale` holds P2 rstd^3 over B's divisor, for p = 1 c_1 P2 rstd^2; shift: from
// P1 rstd to d = P1 rstd - aV over A's divisor; offset: A'[d] / n.
template <class A, class Maps>
struct BackwardFields {
  const Shape& shape;
  const Maps& maps;
  A per_channel;

  __device__ void suppression(int p, A sum) const {
    const A slope = sum * per_channel;
    maps.keep(backward_map::slope, p, slope);
    if (!shape.summation.present) return;
    const A d = maps.load(backward_map::shift, p) - slope * maps.load(backward_map::centred_sum, p);
    maps.store(backward_map::shift, p, d / divisor<A>(shape, shape.summation, p));
  }
  __device__ void summation(int p, A sum) const { maps.keep(backward_map::offset, p, sum * per_channel); }
};

// A sum over a team, in the same order every time; valid in its first thread. `reduction`: one number per warp, for one
// use.
template <class A, class Team = WholeBlock>
__device__ A block_sum(A value, A* reduction, const Team& team = {}) {
  for (int m = device::kWarp / 2; m > 0; m /= 2) value += device::shuffle_xor(value, m);
  const int warp = team.index() / device::kWarp, warps = team.count() / device::kWarp;
  if (team.index() % device::kWarp == 0) reduction[warp] = value;
  team.sync();
  A sum = 0;
  if (team.index() == 0)
    for (int w = 0; w < warps; ++w) sum += reduction[w];
  return sum;
}

}  // namespace divnorm::cuda
