// The work on the maps, one number per position: window sums axis by axis, and what is made of them.
//
// A window of k positions costs two additions a position whatever k is: the sum of a window is the sum of a suffix of
// one block of k positions and of a prefix of the next (van Herk). One thread goes through a block. Nothing is ever
// subtracted, so nothing drifts and a NaN stays inside its windows.
#pragma once

#include <cmath>

#include "numbers.h"
#include "program.h"

namespace divnorm::cuda {

// One of several workers that share a pass; warps of workers are whole.
struct Worker {
  int index, count;
};

__device__ inline int clamped(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

// What the average over the field divides by at position p.
template <class A>
__device__ A divisor(const Shape& shape, const Window& window, int p) {
  A product = 1;
#pragma unroll 1
  for (int a = kAxes - 1; a >= 0; --a) {
    const int extent = shape.extent[a], rest = p / extent, at = p - rest * extent;
    const int inside = clamped(at + window.hi[a], 0, extent - 1) - clamped(at - window.lo[a], 0, extent - 1) + 1;
    product *= static_cast<A>(window.divisor[a] > 0 ? window.divisor[a] : inside);
    p = rest;
  }
  return product;
}

// The lines of a map along an axis: `inner` of them side by side.
struct Lines {
  __host__ __device__ Lines(const Shape& shape, int axis) {
    extent = shape.extent[axis];
    for (int a = axis + 1; a < kAxes; ++a) inner *= shape.extent[a];
    count = shape.positions / extent;
  }
  __device__ int begin(int line) const { return line / inner * inner * extent + line % inner; }
  int extent, inner = 1, count;
};

// Calls emit(position, sum) for every position of a map with the sum of `source` over the pass' window around it.
// Maps: at(map, position) is a reference; the thread that emits a position may use `target` there before.
template <class A, class Maps, class Emit>
__device__ void window_sums(const Shape& shape, const Pass& pass, const Maps& maps, Worker worker, Emit&& emit) {
  if (pass.axis < 0) {
    for (int p = worker.index; p < shape.positions; p += worker.count) emit(p, maps.load(pass.source, p));
    return;
  }
  const Lines lines(shape, pass.axis);
  const int last = lines.extent - 1;
  if (pass.lo >= last && pass.hi >= last) {  // every window covers the axis: a warp sums a line
    const int lane = worker.index % device::kWarp, warps = worker.count / device::kWarp;
    for (int line = worker.index / device::kWarp; line < lines.count; line += warps) {
      const int begin = lines.begin(line);
      A sum = 0;
      for (int e = lane; e <= last; e += device::kWarp) sum += maps.load(pass.source, begin + e * lines.inner);
      for (int m = device::kWarp / 2; m > 0; m /= 2) sum += device::shuffle_xor(sum, m);
      for (int e = lane; e <= last; e += device::kWarp) emit(begin + e * lines.inner, sum);
    }
    return;
  }
  const int length = pass.lo + pass.hi + 1, blocks = last / length + 1;
  for (int task = worker.index; task < lines.count * blocks; task += worker.count) {
    const int inner = task % lines.inner, rest = task / lines.inner;
    const int first = rest % blocks * length, begin = rest / blocks * lines.inner * lines.extent + inner;
    const auto position = [&](int e) { return begin + e * lines.inner; };
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

// One pass of a row, by all workers: sums along an axis, and at the end of a field what `fields` makes of them.
template <class A, class Maps, class Fields>
__device__ void run_pass(const Shape& shape, const Pass& pass, const Maps& maps, Worker worker, const Fields& fields) {
  window_sums<A>(shape, pass, maps, worker, [&](int p, A sum) {
    if (!pass.last)
      maps.store(pass.target, p, sum);
    else if (pass.of_suppression)
      fields.suppression(p, sum);
    else
      fields.summation(p, sum);
  });
}

template <class A>
__device__ A sigma_of(const Tensors& tensors, int group) {
  if (tensors.sigma.data == nullptr) return static_cast<A>(tensors.sigma_value);
  return read<A>(tensors.sigma, tensors.sigma.count == 1 ? 0 : group);
}

// mean and rstd of one row, as forward returns and backward receives them.
template <class A>
struct SavedMaps {
  __device__ SavedMaps(const Shape& shape, const Tensors& tensors, int64_t row)
      : mean(static_cast<A*>(tensors.mean) + (shape.summation.present ? row * shape.map_positions : 0)),
        rstd(static_cast<A*>(tensors.rstd) + (shape.suppression.present ? row * shape.map_positions : 0)),
        step(shape.whole ? 0 : 1) {}
  A *mean, *rstd;
  int step;  // from one position to the next
};

// The maps of a row in shared memory of a cluster: block p >> shift keeps position p.
template <class A>
struct OwnedMaps {
  A* base;
  int shift, stride;
  int blocks;
  SavedMaps<A> saved;

  __device__ A* at(int map, int p) const {
    A* here = base + map * stride + (p & ((1 << shift) - 1));
    return blocks == 1 ? here : device::in_block(here, p >> shift);
  }
  __device__ A load(int map, int p) const { return *at(map, p); }
  __device__ void store(int map, int p, A value) const { *at(map, p) = value; }
  __device__ void save(int map, int p, A value) const {
    store(map, p, value);
    device::store((map == forward_map::mean ? saved.mean : saved.rstd) + p, value);
  }
};

// The maps of a row in global memory; mean and rstd lie in the results themselves.
template <class A>
struct GlobalMaps {
  A* base;
  int64_t stride;  // from one map to the next
  int scratch;     // maps that are not results
  SavedMaps<A> saved;

  __device__ A* at(int map, int p) const {
    return (map < scratch ? base + map * stride : map == scratch ? saved.mean : saved.rstd) + p;
  }
  __device__ A load(int map, int p) const { return device::load(at(map, p)); }
  __device__ void store(int map, int p, A value) const { device::store(at(map, p), value); }
  __device__ void save(int map, int p, A value) const { store(map, p, value); }
};

// mu = A[m]; z = M2/n + (m - mu)^2; rstd = 1 / sqrt(sigma^2 + B[z]). `squares` holds M2/n.
template <class A, class Maps>
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
    const A rstd = A(1) / std::sqrt(sigma * sigma + sum / divisor<A>(shape, shape.suppression, p));
    maps.save(forward_map::rstd, p, rstd);
  }
};

// slope: a = B'[P2 rstd^3] / n, where `scale` holds P2 rstd^3 over B's divisor; shift: from P1 rstd to d = P1 rstd - aV
// over A's divisor; offset: A'[d] / n.
template <class A, class Maps>
struct BackwardFields {
  const Shape& shape;
  const Maps& maps;
  A per_channel;

  __device__ void suppression(int p, A sum) const {
    const A slope = sum * per_channel;
    maps.store(backward_map::slope, p, slope);
    if (!shape.summation.present) return;
    const A d = maps.load(backward_map::shift, p) - slope * maps.load(backward_map::centred_sum, p);
    maps.store(backward_map::shift, p, d / divisor<A>(shape, shape.summation, p));
  }
  __device__ void summation(int p, A sum) const { maps.store(backward_map::offset, p, sum * per_channel); }
};

// A sum over the block, in the same order every time; valid in thread 0. `reduction`: one number per warp,
// for one use.
template <class A>
__device__ A block_sum(A value, A* reduction) {
  for (int m = device::kWarp / 2; m > 0; m /= 2) value += device::shuffle_xor(value, m);
  const int warp = device::thread() / device::kWarp, warps = device::threads() / device::kWarp;
  if (device::thread() % device::kWarp == 0) reduction[warp] = value;
  device::sync_block();
  A sum = 0;
  if (device::thread() == 0)
    for (int w = 0; w < warps; ++w) sum += reduction[w];
  return sum;
}

}  // namespace divnorm::cuda
