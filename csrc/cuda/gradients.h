// The gradients of the parameters: what a block, or a cluster, has collected on its way to the partial sums.
#pragma once

#include "block.h"

namespace divnorm::cuda {

// Zero sums for the gradients of the parameters.
template <class T>
__device__ void clear_gradients(const Affine<T>& affine, int numbers) {
  if (affine.dweight == nullptr) return;
  fill(affine.dweight, numbers, Acc<T>(0));
  fill(affine.dbias, numbers, Acc<T>(0));
  if (affine.dthreshold != nullptr) fill(affine.dthreshold, numbers, Acc<T>(0));
}

// The sum over what the `sharers` threads of a channel have collected; of a position there is one.
template <class A>
struct Collected {
  __device__ A operator()(const A* gradients, int i) const {
    A sum = gradients[i];
    for (int s = 1; s < sharers; ++s) sum += gradients[s * channels + i];
    return sum;
  }
  int sharers, channels;
};

// Gradients begin..end of a tile's channels, or positions, as a part of one slot of the partial sums:
// sum_of(gradients, i) of each parameter's.
template <class T, class SumOf>
__device__ void store_slot(const Shape& shape, const Partials& partials, int64_t slot, int group, const Tile& tile,
                           const Affine<T>& affine, int begin, int end, SumOf&& sum_of) {
  using A = Acc<T>;
  const int64_t size = shape.per_position ? shape.positions : shape.channels;
  const int64_t first =
      slot * size +
      (shape.per_position ? tile.position : static_cast<int64_t>(group) * shape.group_channels + tile.channel);
  for (int i = begin + device::thread(); i < end; i += device::threads()) {
    device::store(static_cast<A*>(partials.dweight) + first + i, sum_of(affine.dweight, i));
    device::store(static_cast<A*>(partials.dbias) + first + i, sum_of(affine.dbias, i));
    if (affine.dthreshold != nullptr)
      device::store(static_cast<A*>(partials.dthreshold) + first + i, sum_of(affine.dthreshold, i));
  }
}

// The gradients that a block has collected, as one slot.
template <class T>
__device__ void store_gradients(const Shape& shape, const Partials& partials, int64_t slot, int group, const Tile& tile,
                                int sharers, const Affine<T>& affine) {
  if (affine.dweight == nullptr) return;
  device::sync_block();
  store_slot(shape, partials, slot, group, tile, affine, 0, shape.per_position ? tile.positions : tile.channels,
             Collected<Acc<T>>{shape.per_position ? 1 : sharers, tile.channels});
}

// The gradients that the blocks of a cluster have collected at their positions of the same channels, as one slot for
// all of them: each adds up a part of the channels. Not per position. Behind the first of its barriers no block reads
// the maps of another any more, behind the last one nothing of another.
template <class T>
__device__ void merge_gradients(const Shape& shape, const Partials& partials, const Resident& r, int64_t slot,
                                int group, int rank, const Tile& tile, int sharers, const Affine<T>& affine) {
  using A = Acc<T>;
  const bool wanted = affine.dweight != nullptr;
  if (wanted) {
    device::sync_block();
    const Collected<A> sum_of{sharers, tile.channels};
    for (int i = device::thread(); i < tile.channels; i += device::threads()) {
      affine.dweight[i] = sum_of(affine.dweight, i);
      affine.dbias[i] = sum_of(affine.dbias, i);
      if (affine.dthreshold != nullptr) affine.dthreshold[i] = sum_of(affine.dthreshold, i);
    }
  }
  device::sync_cluster_shared(r.blocks);
  if (!wanted) return;
  const int first_block = rank % r.channel_blocks, slice = rank / r.channel_blocks;
  const int each = (tile.channels - 1) / r.position_blocks + 1, begin = clamped(slice * each, 0, tile.channels);
  store_slot(shape, partials, slot, group, tile, affine, begin, clamped(begin + each, 0, tile.channels),
             [&](const A* gradients, int i) {
               A sum = 0;
#pragma unroll 4
               for (int block = first_block; block < r.blocks; block += r.channel_blocks)
                 sum += block == rank ? gradients[i] : *device::in_block(gradients + i, block);
               return sum;
             });
  device::sync_cluster_shared(r.blocks);
}

}  // namespace divnorm::cuda
