// Of whole fields, backward's first sweep where something of the caller's stands between the statistics and their use
// (divnorm_kernels/seam): sums over rows, and the gradients of the parameters.
#pragma once

#include "gradients.h"
#include "items.h"

namespace divnorm::cuda {

// The sums of a tile, or of a block's tiles where they are of one row, as its part of the row: (parts, kTotals, rows).
// each: room for kTotals numbers of every warp.
template <class A>
__device__ void keep_row_sums(const Arguments& args, int64_t part, int64_t row, const RowSums<A>& sums, A* each) {
  const int warp = device::thread() / device::kWarp, warps = device::threads() / device::kWarp;
  A all[kTotals] = {sums.pull, sums.product, sums.signs};
#pragma unroll
  for (int k = 0; k < kTotals; ++k) {
    for (int m = device::kWarp / 2; m > 0; m /= 2) all[k] += device::shuffle_xor(all[k], m);
    if (device::thread() % device::kWarp == 0) each[k * warps + warp] = all[k];
  }
  device::sync_block();
  const int k = device::thread();
  if (k >= kTotals) return;
  A sum = 0;
  for (int w = 0; w < warps; ++w) sum += each[k * warps + w];
  device::store(static_cast<A*>(args.staged.merged) + (part * kTotals + k) * args.staged.map_rows + row, sum);
}

// A block takes the tiles of a span of samples, as one of the last stage does (staged.h).
template <class T, bool ChannelsLast>
__global__ void __launch_bounds__(kStagedThreads, blocks_for(kStagedBlocks, sizeof(T)))
    seam_sums(const __grid_constant__ Arguments args) {
  using A = Acc<T>;
  using Tiles = Work<T, ChannelsLast, Form::general>;
  device::let_next_begin();
  clear_counters(args.partials);
  const Shape& shape = args.shape;
  const Memory<T, Form::general> memory(shape, args.staged.apply_shared);
  const ApplyItem at(args, {0, 0, static_cast<int>(device::block())});
  const Tile whole = at.tile(args, 0);
  const A with_signs = args.tensors.dl1 == nullptr ? A(0) : A(1);
  const int sharers = Tiles::sharers(whole);
  load_affine(shape, args.tensors, at.group, whole.channel, whole.channels, whole.position, whole.positions,
              memory.affine);
  clear_gradients(memory.affine, shape.per_position ? whole.positions : whole.channels * sharers);
  RowSums<A> sums;
  for (int64_t sample = at.samples.begin; sample < at.samples.end; ++sample) {
    const Tile tile = at.tile(args, sample);
    const int64_t row = row_of(shape, sample, at.group);
    const auto maps = maps_of_row<A>(args, kBackwardScratchMaps, row);
    copy_in(tile, args.tensors.x, memory.x);
    copy_in(tile, args.tensors.dy, memory.dy);
    if (memory.residual != nullptr) copy_in(tile, args.tensors.residual, memory.residual);
    fetch(maps, backward_map::mean, true, A(0), tile, memory.local.mean);
    fetch(maps, backward_map::rstd, true, A(1), tile, memory.local.rstd);
    device::copies_done();
    device::sync_block();
    const RowSums<A> more =
        Tiles::template differentiate<Sweep::sums>(tile, memory.x, memory.dy, memory.local, memory.affine, with_signs);
    sums = {sums.pull + more.pull, sums.product + more.product, sums.signs + more.signs};
    if (shape.over_batch && sample + 1 < at.samples.end) {
      device::sync_block();  // the next tile takes this one's place
      continue;
    }
    keep_row_sums(args, at.part_of_row, row, sums, memory.owned);
    sums = {};
  }
  store_gradients(shape, args.partials, at.slot, at.group, whole, sharers, memory.affine);
}

}  // namespace divnorm::cuda
