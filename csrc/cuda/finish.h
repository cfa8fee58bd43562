// Partial sums become the parameters' gradients and l1, in an order that depends on sizes alone.
#pragma once

#include "numbers.h"
#include "program.h"

namespace divnorm::cuda {

// Sets the counters of the sums that follow to zero.
__device__ inline void clear_counters(const Partials& partials) {
  if (device::block() != 0) return;
  for (int i = device::thread(); i < partials.counter_count; i += device::threads())
    device::store(partials.counters + i, 0);
}

template <class A, int Count>
__device__ void accumulate(Pack<A, Count>& sums, const Pack<A, Count>& more) {
#pragma unroll
  for (int i = 0; i < Count; ++i) sums.at[i] += more.at[i];
}

// source[row * step] over rows first, first + workers, ... below end, kLoadsTogether of them under way at once.
template <class Numbers>
__device__ Numbers sum_of_rows(const Numbers* source, int64_t first, int64_t end, int64_t workers, int64_t step) {
  Numbers sum = {};
  int64_t row = first;
  for (; row + (kLoadsTogether - 1) * workers < end; row += kLoadsTogether * workers) {
    Numbers numbers[kLoadsTogether];
#pragma unroll
    for (int i = 0; i < kLoadsTogether; ++i) numbers[i] = device::load(source + (row + i * workers) * step);
#pragma unroll
    for (int i = 0; i < kLoadsTogether; ++i) accumulate(sum, numbers[i]);
  }
  for (; row < end; row += workers) accumulate(sum, device::load(source + row * step));
  return sum;
}

// Rows begin..end of a column, or of Count side by side, summed by a block: a warp's lanes take the columns of a set,
// and where these are fewer the next rows as well. The first lanes of the first warp receive the sums. room: for the
// numbers of every thread.
template <class A, int Count>
__device__ Pack<A, Count> sum_of_column(const Pack<A, Count>* column, bool present, int columns, int64_t begin,
                                        int64_t end, int64_t step, unsigned char* room) {
  const int thread = device::thread(), lane = thread % device::kWarp, warps = device::threads() / device::kWarp;
  const int rows = device::kWarp / columns, row = thread / device::kWarp * rows + lane / columns;
  Pack<A, Count> sum = {};
  if (present) sum = sum_of_rows(column, begin + row, end, int64_t{warps} * rows, step);
  for (int m = device::kWarp / 2; m >= columns; m /= 2)
#pragma unroll
    for (int i = 0; i < Count; ++i) sum.at[i] += device::shuffle_xor(sum.at[i], m);
  auto* sums = reinterpret_cast<Pack<A, Count>*>(room);
  device::sync_block();  // the last ones have been read
  sums[thread] = sum;
  device::sync_block();
  if (thread < columns)
    for (int w = 1; w < warps; ++w) accumulate(sum, sums[w * device::kWarp + lane]);
  return sum;
}

// What a column's sum comes to.
template <class A>
__device__ void keep_sum(const Reduction& r, int64_t column, A sum) {
  if (r.sigma.data != nullptr) sum *= read<A>(r.sigma, column);
  write<A>(r.result, column, sum * static_cast<A>(r.factor));
}

// A block sums a slice of the rows of a set of columns; the last one of a set sums the slices.
template <class A>
__global__ void __launch_bounds__(kFinishThreads) finish(const __grid_constant__ FinishArguments args) {
  using Number = Pack<A, 1>;
  static_assert(kFinishColumns == device::kWarp, "a lane takes a column");
  device::wait_for_launch_before();
  int64_t index = device::block(), first_set = 0;
  int which = 0;
  const auto blocks = [&](int i) { return args.reduction[i].sets * args.reduction[i].slices; };
  while (index >= blocks(which)) {
    first_set += args.reduction[which].sets;
    index -= blocks(which++);
  }
  const Reduction& r = args.reduction[which];
  const int64_t set = index / r.slices, slice = index % r.slices, each = (r.rows + r.slices - 1) / r.slices;
  const int lane = device::thread() % r.block_columns;
  const int64_t column = set * r.block_columns + lane;
  const bool present = column < r.columns, first = device::thread() < r.block_columns;
  const int64_t begin = slice * each, end = begin + each < r.rows ? begin + each : r.rows;
  Number sum = sum_of_column(static_cast<const Number*>(r.source) + column * r.column_step, present, r.block_columns,
                             begin, end, r.row_step, device::shared_memory());
  if (r.slices > 1) {
    Number* const slices = static_cast<Number*>(args.slices) + (device::block() - slice) * kFinishColumns + lane;
    if (first) device::store(slices + slice * kFinishColumns, sum);
    device::sync_block();
    int* const all = reinterpret_cast<int*>(device::shared_memory());
    if (device::thread() == 0) *all = device::arrive(args.counters + first_set + set);
    device::sync_block();
    if (*all != r.slices - 1) return;
    sum = sum_of_column(slices, true, r.block_columns, 0, r.slices, kFinishColumns, device::shared_memory());
  }
  if (first && present) keep_sum(r, column, sum.at[0]);
}

}  // namespace divnorm::cuda
