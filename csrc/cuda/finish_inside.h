// The sums over partial sums at the end of the kernel that leaves them, without a launch behind it.
//
// Every block flags to each of the last blocks of the grid that its partial sums are there; these wait for the flags of
// all and share the columns, and nobody waits for them. The grid has no more blocks than the device holds at once.
// Where other kernels have a part of it, blocks that still have no place get one as others end: blocks start in the
// order of their numbers, those that wait are the last. A flag is a 64-bit number of the launch, which the host draws,
// so that scratch memory need not be cleared in front: what lies there by chance is that number once in 2^63. Who
// waited sets its flags to zero, for a CUDA graph gives the same number again.
#pragma once

#include "finish.h"

namespace divnorm::cuda {

// A set of columns, Count numbers of each thread, as a block's share of the sums.
template <int Count, class A>
__device__ void sum_set(const Reduction& r, int64_t set, unsigned char* room) {
  using Numbers = Pack<A, Count>;
  const int64_t column = (set * r.block_columns + device::thread() % r.block_columns) * Count;
  const bool present = column < r.columns;
  const auto* source = reinterpret_cast<const Numbers*>(static_cast<const A*>(r.source) + column * r.column_step);
  const Numbers sum = sum_of_column(source, present, r.block_columns, 0, r.rows, r.row_step / Count, room);
  if (device::thread() >= r.block_columns || !present) return;
  for (int i = 0; i < Count; ++i) keep_sum(r, column + i, sum.at[i]);
}

// The end of a kernel, by all threads of a block whose partial sums have been stored. room: kVectorBytes of shared
// memory for every thread, which nothing else reads or writes any more.
template <class A>
__device__ void finish_inside(const FinishInside& inside, unsigned char* room) {
  if (inside.sums.count == 0) return;
  device::sync_block();
  for (int64_t i = device::thread(); i < inside.blocks; i += device::threads())
    device::signal(inside.flags + i * inside.grid + device::block(), inside.number);
  const int64_t place = device::block() - (inside.grid - inside.blocks);  // among those who sum
  if (place < 0) return;
  device::wait_for_all(inside.flags + place * inside.grid, inside.grid, inside.number);
  device::sync_block();
  int64_t set = place;
  for (int i = 0; i < inside.sums.count; ++i) {
    const Reduction& r = inside.sums.reduction[i];
    for (; set < r.sets; set += inside.blocks)
      if (r.numbers == 1)
        sum_set<1, A>(r, set, room);
      else
        sum_set<kVectorBytes / sizeof(A), A>(r, set, room);
    set -= r.sets;
  }
}

}  // namespace divnorm::cuda
