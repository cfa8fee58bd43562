// Rows that fit the shared memory of a block, or of a cluster of blocks: one read of x (and dy), one write of the
// result. A block holds a slice of the row's channels and positions; sums over the channels and windows that reach into
// other blocks go through distributed shared memory.
#pragma once

#include "finish_inside.h"
#include "gradients.h"
#include "place.h"
#include "whole.h"

namespace divnorm::cuda {

// The partial statistics of a position by the blocks that hold slices of its channels.
template <class A>
class PartialsOf {
 public:
  __device__ PartialsOf(const Resident& r, int rank, const A* partial, int p)
      : here_(partial + p % r.tile_positions), rank_(rank), first_(p / r.tile_positions * r.channel_blocks) {}
  // Number `at` of those of the block with channel slice `slice`.
  __device__ A load(int slice, int at) const {
    const int block = first_ + slice;
    return block == rank_ ? here_[at] : *device::in_block(here_ + at, block);
  }

 private:
  const A* here_;
  int rank_, first_;
};

// Runs passes first ... end - 1 over the maps; every block of the cluster sees the result. field(maps) is what ends a
// field.
template <class A, class Field>
__device__ void run_passes(const Arguments& args, const OwnedMaps<A>& maps, const Place& place, int first, int end,
                           Field&& field) {
  const int blocks = args.resident.blocks, thread = device::thread(), threads = device::threads();
  device::sync_cluster_shared(blocks);
  for (int i = first; i < end; ++i) {
    const Pass& pass = args.shape.passes[i];
    if (by_positions(pass)) {
      run_by_positions<A>(pass, maps, Positions{place.owned_begin + thread, place.owned_end, threads}, field(maps));
      device::sync_cluster_shared(blocks);
    } else if (blocks == 1) {
      run_by_lines<A>(pass, maps, Worker{thread, threads}, field(maps));
      device::sync_block();
    } else {
      const ClusterMaps<A> all{maps};
      run_by_lines<A>(pass, all, Worker{place.rank * threads + thread, blocks * threads}, field(all));
      device::sync_cluster(blocks);
    }
  }
}

// Hands a block's totals to one thread of the cluster, which calls end(totals) with totals(block, which); every block
// sees what that stores.
template <class A, class M, class End>
__device__ void merge_blocks(const Arguments& args, const M& memory, const Place& place, A first, A second, A third,
                             End&& end) {
  const int blocks = args.resident.blocks;
  if (device::thread() == 0) {
    memory.totals[0] = first;
    memory.totals[1] = second;
    memory.totals[2] = third;
  }
  device::sync_cluster_shared(blocks);
  if (place.rank == 0 && device::thread() == 0)
    end([&](int block, int which) {
      const A* here = memory.totals + which;
      return blocks == 1 ? *here : *device::in_block(here, block);
    });
  device::sync_cluster_shared(blocks);
}

// Of p = 1, once the mean is known: the sums of |v|, and what comes of them.
template <class T, bool ChannelsLast>
__device__ void resident_deviations(const Arguments& args, const Memory<T, Form::general>& memory, const Place& place,
                                    const Tile& tile, const OwnedMaps<Acc<T>>& maps) {
  using A = Acc<T>;
  constexpr Form F = Form::general;
  const Shape& shape = args.shape;
  const Resident& r = args.resident;
  Work<T, ChannelsLast, F>::deviations(tile, memory.x, memory.local.mean, r.slices, memory.partial, memory.pitch);
  device::sync_cluster_shared(r.blocks);
  A all = 0;
  for (int p = place.owned_begin + device::thread(); p < place.owned_end; p += device::threads()) {
    const PartialsOf<A> partials(r, place.rank, memory.partial, p);
    A sum = 0;
    for (int block = 0; block < r.channel_blocks; ++block)
      for (int slice = 0; slice < r.slices.count; ++slice) sum += partials.load(block, slice * memory.pitch);
    all += sum;
    maps.store(forward_map::squares, p, sum / static_cast<A>(shape.group_channels));
  }
  if (!shape.whole) {
    const A sigma = sigma_of<A>(args.tensors, place.group);
    return run_passes<A>(args, maps, place, shape.mean_passes, shape.pass_count, [&](const auto& of) {
      return ForwardFields<F, A, std::decay_t<decltype(of)>>{shape, of, sigma};
    });
  }
  all = shared_sum(all, memory.reduction);
  merge_blocks<A>(args, memory, place, all, A(0), A(0), [&](auto&& totals) {
    A sum = 0;
    for (int block = 0; block < r.blocks; ++block) sum += totals(block, 0);
    save_deviation(args, maps, place.group, sum);
  });
}

template <class T, bool ChannelsLast, Form F>
__global__ void __launch_bounds__(kResidentThreads, blocks_for(kResidentBlocks, sizeof(T)))
    resident_forward(const __grid_constant__ Arguments args) {
  using A = Acc<T>;
  using Tiles = Work<T, ChannelsLast, F>;
  const Shape& shape = args.shape;
  const Resident& r = args.resident;
  const Place place(args);
  const Memory<T, F> memory(shape, args.shared);
  const int n = shape.group_channels;
  device::let_next_begin();
  clear_counters(args.partials);
  {
    const Tile tile = place.tile(args, 0);
    load_affine(shape, args.tensors, place.group, tile.channel, tile.channels, tile.position, tile.positions,
                memory.affine);
  }
  A l1 = 0;
  for (int64_t sample = place.part; sample < shape.batch; sample += r.parts) {
    if (sample > place.part) device::sync_block();  // the last result is out
    const Tile tile = place.tile(args, sample);
    copy_in(tile, args.tensors.x, memory.x);
    if (memory.residual != nullptr) copy_in(tile, args.tensors.residual, memory.residual);
    device::copies_done();
    device::sync_block();
    const OwnedMaps<A> maps{memory.owned, r.owned, place.owned_begin, r.by_owned,
                            SavedMaps<A>(shape, args.tensors, sample * shape.groups + place.group)};
    if (absolute<F>(shape) ? shape.summation.present : shape.statistics) {
      Tiles::moments(tile, memory.x, shape.summation.present, r.slices, memory.partial, memory.pitch);
      device::sync_cluster_shared(r.blocks);
      for (int p = place.owned_begin + device::thread(); p < place.owned_end; p += device::threads()) {
        const PartialsOf<A> partials(r, place.rank, memory.partial, p);
        const auto whole = Moments<A>::merged(r.channel_blocks, r.slices.count, [&](int block, int slice) {
          const int channels = clamped(n - block * r.tile_channels, 0, r.tile_channels);
          return Moments<A>{static_cast<A>(slice_channels(channels, slice, r.slices)),
                            partials.load(block, slice * memory.pitch),
                            partials.load(block, (r.slices.count + slice) * memory.pitch)};
        });
        maps.store(forward_map::mean_of_channels, p, whole.mean);
        maps.store(forward_map::squares, p, whole.squares / static_cast<A>(n));
      }
      if (shape.whole) {
        const auto own = block_moments(place.owned_end - place.owned_begin, memory.reduction, [&](int i) {
          const int p = place.owned_begin + i;
          return Moments<A>{A(1), maps.load(forward_map::mean_of_channels, p), maps.load(forward_map::squares, p)};
        });
        merge_blocks<A>(args, memory, place, own.count, own.mean, own.squares, [&](auto&& totals) {
          save_statistics<F>(args, maps, place.group, Moments<A>::merged(1, r.blocks, [&](int, int block) {
                               return Moments<A>{totals(block, 0), totals(block, 1), totals(block, 2)};
                             }));
        });
      } else {
        const A sigma = sigma_of<A>(args.tensors, place.group);
        run_passes<A>(
            args, maps, place, 0, absolute<F>(shape) ? shape.mean_passes : shape.pass_count,
            [&](const auto& of) { return ForwardFields<F, A, std::decay_t<decltype(of)>>{shape, of, sigma}; });
      }
    }
    fetch(maps, forward_map::mean, shape.summation.present, A(0), tile, memory.local.mean);
    if constexpr (F == Form::general)
      if (shape.absolute) {
        device::sync_block();
        resident_deviations<T, ChannelsLast>(args, memory, place, tile, maps);
      }
    fetch(maps, forward_map::rstd, shape.suppression.present, A(1), tile, memory.local.rstd);
    device::sync_block();
    l1 += Tiles::normalize(tile, memory.x, memory.local, memory.affine, args.partials.l1 != nullptr);
    device::sync_block();
    copy_out(tile, memory.x, args.tensors.out);
  }
  if (r.blocks > 1) device::sync_cluster_shared(r.blocks);  // no block ends while another reads its maps
  store_sum(args.partials.l1, place.slot(r), l1, memory.reduction);
  finish_inside<A>(args.inside, device::shared_memory());
}

template <class T, bool ChannelsLast, Form F>
__global__ void __launch_bounds__(kResidentThreads, blocks_for(kResidentBlocks, sizeof(T)))
    resident_backward(const __grid_constant__ Arguments args) {
  using A = Acc<T>;
  using Tiles = Work<T, ChannelsLast, F>;
  const Shape& shape = args.shape;
  const Resident& r = args.resident;
  const Place place(args);
  const Memory<T, F> memory(shape, args.shared);
  const int n = shape.group_channels;
  device::let_next_begin();
  clear_counters(args.partials);
  {
    const Tile tile = place.tile(args, 0);
    load_affine(shape, args.tensors, place.group, tile.channel, tile.channels, tile.position, tile.positions,
                memory.affine);
    clear_gradients(memory.affine, shape.per_position ? tile.positions : tile.channels * Tiles::sharers(tile));
  }
  const A l1 = l1_gradient<A>(args.tensors);
  A dsigma = 0;
  for (int64_t sample = place.part; sample < shape.batch; sample += r.parts) {
    if (sample > place.part) device::sync_block();  // the last result is out
    const Tile tile = place.tile(args, sample);
    copy_in(tile, args.tensors.x, memory.x);
    copy_in(tile, args.tensors.dy, memory.dy);
    if (memory.residual != nullptr) copy_in(tile, args.tensors.residual, memory.residual);
    const OwnedMaps<A> maps{memory.owned, r.owned, place.owned_begin, r.by_owned,
                            SavedMaps<A>(shape, args.tensors, sample * shape.groups + place.group)};
    const int saved_end = place.owned_end < shape.map_positions ? place.owned_end : shape.map_positions;
    for (int p = place.owned_begin + device::thread(); p < saved_end; p += device::threads()) {
      if (shape.summation.present) maps.store(backward_map::mean, p, device::load(maps.saved.mean + p));
      if (shape.suppression.present) maps.store(backward_map::rstd, p, device::load(maps.saved.rstd + p));
    }
    device::copies_done();
    device::sync_cluster_shared(r.blocks);
    fetch(maps, backward_map::mean, shape.summation.present, A(0), tile, memory.local.mean);
    fetch(maps, backward_map::rstd, shape.suppression.present, A(1), tile, memory.local.rstd);
    device::sync_block();
    if (shape.statistics) {
      Tiles::sums(tile, memory.x, memory.dy, memory.local, memory.affine, l1, r.slices, memory.partial, memory.pitch);
      device::sync_cluster_shared(r.blocks);
      A all_scale = 0, all_shift = 0, all_centred = 0;
      for (int p = place.owned_begin + device::thread(); p < place.owned_end; p += device::threads()) {
        A scale = 0, shift = 0, centred = 0;
        const PartialsOf<A> partials(r, place.rank, memory.partial, p);
        for (int block = 0; block < r.channel_blocks; ++block)
          for (int slice = 0; slice < r.slices.count; ++slice) {
            scale += partials.load(block, slice * memory.pitch);
            shift += partials.load(block, (r.slices.count + slice) * memory.pitch);
            centred += partials.load(block, (2 * r.slices.count + slice) * memory.pitch);
          }
        if (shape.whole) {
          all_scale += scale;
          all_shift += shift;
          if (absolute<F>(shape)) all_centred += centred;
        } else {
          dsigma += start_backward<F>(shape, maps, p, scale, shift, centred);
        }
      }
      if (shape.whole) {
        all_scale = shared_sum(all_scale, memory.reduction);
        all_shift = shared_sum(all_shift, memory.reduction);
        if (absolute<F>(shape)) all_centred = shared_sum(all_centred, memory.reduction);
        merge_blocks<A>(args, memory, place, all_scale, all_shift, all_centred, [&](auto&& totals) {
          A scale = 0, shift = 0, centred = 0;
          for (int block = 0; block < r.blocks; ++block) {
            scale += totals(block, 0);
            shift += totals(block, 1);
            if (absolute<F>(shape)) centred += totals(block, 2);
          }
          dsigma += save_slopes<F>(args, maps, place.group, scale, shift, centred);
        });
      } else {
        run_passes<A>(args, maps, place, 0, shape.pass_count, [&](const auto& of) {
          return BackwardFields<A, std::decay_t<decltype(of)>>{shape, of, A(1) / static_cast<A>(n)};
        });
      }
    }
    fetch(maps, backward_map::slope, shape.suppression.present, A(0), tile, memory.local.slope);
    fetch(maps, backward_map::offset, shape.summation.present, A(0), tile, memory.local.offset);
    device::sync_block();
    Tiles::differentiate(tile, memory.x, memory.dy, memory.local, memory.affine, l1);
    device::sync_block();
    copy_out(tile, memory.x, args.tensors.out);
    if (memory.residual != nullptr && args.tensors.dresidual != nullptr)
      copy_out(tile, memory.residual, args.tensors.dresidual);
  }
  const Tile tile = place.tile(args, 0);
  const int sharers = Tiles::sharers(tile);
  if (r.merges_gradients) {
    merge_gradients(shape, args.partials, r, place.part, place.group, place.rank, tile, sharers, memory.affine);
  } else {
    if (r.blocks > 1) device::sync_cluster_shared(r.blocks);  // no block ends while another reads its maps
    const int64_t slot =
        shape.per_position ? place.part : static_cast<int64_t>(place.part) * r.position_blocks + place.position_slice;
    store_gradients(shape, args.partials, slot, place.group, tile, sharers, memory.affine);
  }
  store_sum(args.partials.dsigma, place.slot(r), signed_dsigma<F>(args, place.group, dsigma), memory.reduction);
  finish_inside<A>(args.inside, device::shared_memory());
}

}  // namespace divnorm::cuda
