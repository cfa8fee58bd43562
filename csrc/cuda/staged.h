// Rows of any size, and statistics over the batch: x is read twice, the second time from the second-level cache.
//
// One launch does all stages. A block takes one item of work by a ticket; items are numbered so that an item depends on
// lower numbers alone, so that whatever it waits for is done or at work. Samples go through in chunks: the last stage
// of a chunk follows a few chunks after the first, while the chunk is in the cache.
#pragma once

#include "gradients.h"
#include "merges.h"

namespace divnorm::cuda {

template <class T, bool ChannelsLast, Form F>
__device__ void forward_statistics(const Arguments& args, const Memory<T, F>& memory, const Item& item) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  const Staged& s = args.staged;
  const StatisticsItem at(args, item);
  const Slices& slices = s.slices;
  const int pitch = memory.pitch;
  A* mean = memory.owned;
  A* squares = memory.owned + pitch;
  A counted = 0;
  for (int64_t sample = at.samples.begin; sample < at.samples.end; ++sample)
    for (int channel = 0; channel < shape.group_channels; channel += s.tile_channels) {
      const Tile tile = tile_at(shape, sample, at.group, channel, s.tile_channels, at.position, at.positions);
      copy_in(tile, args.tensors.x, memory.x, device::Again(s.chunks > 1));
      device::copies_done();
      device::sync_block();
      Work<T, ChannelsLast, F>::moments(tile, memory.x, shape.summation.present, slices, memory.partial, pitch);
      device::sync_block();
      for (int p = device::thread(); p < tile.positions; p += device::threads()) {
        const auto whole = Moments<A>::merged(1, slices.count + 1, [&](int, int i) {
          if (i == slices.count) return counted > A(0) ? Moments<A>{counted, mean[p], squares[p]} : Moments<A>{0, 0, 0};
          return Moments<A>{static_cast<A>(slice_channels(tile.channels, i, slices)), memory.partial[i * pitch + p],
                            memory.partial[(slices.count + i) * pitch + p]};
        });
        mean[p] = whole.mean;
        squares[p] = whole.squares;
      }
      counted += static_cast<A>(tile.channels);
    }
  if (at.samples.begin >= at.samples.end) return;
  if (shape.whole) {
    const auto all =
        block_moments(at.positions, memory.reduction, [&](int p) { return Moments<A>{counted, mean[p], squares[p]}; });
    const WholeRow row(args, at.samples.begin, at.group);
    return keep_totals(row.totals<A>(args, at.unit * at.tiles * shape.over_batch + at.tile), all.count, all.mean,
                       all.squares);
  }
  for (int p = device::thread(); p < at.positions; p += device::threads()) {
    if (shape.over_batch) {
      device::store(merged_at<A>(args, 0, kForwardStatistics, at.unit, at.group, at.position + p), mean[p]);
      device::store(merged_at<A>(args, 1, kForwardStatistics, at.unit, at.group, at.position + p), squares[p]);
    } else {
      const auto maps = maps_of_row<A>(args, kForwardScratchMaps, row_of(shape, at.samples.begin, at.group));
      maps.store(forward_map::mean_of_channels, at.position + p, mean[p]);
      maps.store(forward_map::squares, at.position + p, squares[p] / counted);
    }
  }
}

// The same of p = 1 once the mean is known: the sums of |v|.
template <class T, bool ChannelsLast>
__device__ void forward_deviations(const Arguments& args, const Memory<T, Form::general>& memory, const Item& item) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  const Staged& s = args.staged;
  const StatisticsItem at(args, item);
  A* const sums = memory.owned;
  fill(sums, at.positions, A(0));
  for (int64_t sample = at.samples.begin; sample < at.samples.end; ++sample) {
    const auto maps = maps_of_row<A>(args, kForwardScratchMaps, row_of(shape, sample, at.group));
    for (int channel = 0; channel < shape.group_channels; channel += s.tile_channels) {
      const Tile tile = tile_at(shape, sample, at.group, channel, s.tile_channels, at.position, at.positions);
      copy_in(tile, args.tensors.x, memory.x, device::Again(s.chunks > 1));
      if (channel == 0) fetch(maps, forward_map::mean, shape.summation.present, A(0), tile, memory.local.mean);
      device::copies_done();
      device::sync_block();
      Work<T, ChannelsLast, Form::general>::deviations(tile, memory.x, memory.local.mean, s.slices, memory.partial,
                                                       memory.pitch);
      device::sync_block();
      for (int p = device::thread(); p < tile.positions; p += device::threads())
        for (int i = 0; i < s.slices.count; ++i) sums[p] += memory.partial[i * memory.pitch + p];
    }
  }
  if (at.samples.begin >= at.samples.end) return;
  if (shape.whole) {
    A sum = 0;
    for (int p = device::thread(); p < at.positions; p += device::threads()) sum += sums[p];
    sum = shared_sum(sum, memory.reduction);
    const WholeRow row(args, at.samples.begin, at.group);
    return keep_totals(row.totals<A>(args, at.unit * at.tiles * shape.over_batch + at.tile), sum, A(0), A(0));
  }
  for (int p = device::thread(); p < at.positions; p += device::threads()) {
    if (shape.over_batch)
      device::store(merged_at<A>(args, 0, kForwardStatistics, at.unit, at.group, at.position + p), sums[p]);
    else
      maps_of_row<A>(args, kForwardScratchMaps, row_of(shape, at.samples.begin, at.group))
          .store(forward_map::squares, at.position + p, sums[p] / static_cast<A>(shape.group_channels));
  }
}

template <class T, bool ChannelsLast, Form F>
__device__ Acc<T> backward_statistics(const Arguments& args, const Memory<T, F>& memory, const Item& item) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  const Staged& s = args.staged;
  const StatisticsItem at(args, item);
  const Slices& slices = s.slices;
  const int pitch = memory.pitch;
  const A l1 = l1_gradient<A>(args.tensors);
  fill(memory.owned, kBackwardStatistics * pitch, A(0));
  for (int64_t sample = at.samples.begin; sample < at.samples.end; ++sample) {
    const auto maps = maps_of_row<A>(args, kBackwardScratchMaps, row_of(shape, sample, at.group));
    for (int channel = 0; channel < shape.group_channels; channel += s.tile_channels) {
      const Tile tile = tile_at(shape, sample, at.group, channel, s.tile_channels, at.position, at.positions);
      copy_in(tile, args.tensors.x, memory.x, device::Again(s.chunks > 1));
      copy_in(tile, args.tensors.dy, memory.dy, device::Again(s.chunks > 1));
      if (memory.residual != nullptr)
        copy_in(tile, args.tensors.residual, memory.residual, device::Again(s.chunks > 1));
      if (channel == 0) {
        fetch(maps, backward_map::mean, shape.summation.present, A(0), tile, memory.local.mean);
        fetch(maps, backward_map::rstd, shape.suppression.present, A(1), tile, memory.local.rstd);
      }
      load_affine(shape, args.tensors, at.group, tile.channel, tile.channels, tile.position, tile.positions,
                  memory.affine);
      device::copies_done();
      device::sync_block();
      Work<T, ChannelsLast, F>::sums(tile, memory.x, memory.dy, memory.local, memory.affine, l1, slices, memory.partial,
                                     pitch);
      device::sync_block();
      for (int p = device::thread(); p < tile.positions; p += device::threads())
        for (int k = 0; k < kBackwardStatistics; ++k)
          for (int i = 0; i < slices.count; ++i)
            memory.owned[k * pitch + p] += memory.partial[(k * slices.count + i) * pitch + p];
    }
  }
  if (at.samples.begin >= at.samples.end) return 0;
  if (shape.whole) {
    A scale = 0, shift = 0, centred = 0;
    for (int p = device::thread(); p < at.positions; p += device::threads()) {
      scale += memory.owned[p];
      shift += memory.owned[pitch + p];
      if (absolute<F>(shape)) centred += memory.owned[2 * pitch + p];
    }
    scale = shared_sum(scale, memory.reduction);
    shift = shared_sum(shift, memory.reduction);
    if (absolute<F>(shape)) centred = shared_sum(centred, memory.reduction);
    const WholeRow row(args, at.samples.begin, at.group);
    keep_totals(row.totals<A>(args, at.unit * at.tiles * shape.over_batch + at.tile), scale, shift, centred);
    return 0;
  }
  A dsigma = 0;
  for (int p = device::thread(); p < at.positions; p += device::threads()) {
    if (shape.over_batch) {
      for (int k = 0; k < kBackwardStatistics; ++k)
        device::store(merged_at<A>(args, k, kBackwardStatistics, at.unit, at.group, at.position + p),
                      memory.owned[k * pitch + p]);
    } else {
      const auto maps = maps_of_row<A>(args, kBackwardScratchMaps, row_of(shape, at.samples.begin, at.group));
      dsigma += start_backward<F>(shape, maps, at.position + p, memory.owned[p], memory.owned[pitch + p],
                                  memory.owned[2 * pitch + p]);
    }
  }
  return dsigma;
}

// A share of some passes over the map of one row; field(row's maps) is what ends a field.
template <class A, class Field>
__device__ void staged_passes(const Arguments& args, const Item& item, int scratch, Field&& field) {
  const Shape& shape = args.shape;
  const Staged& s = args.staged;
  const int part = item.index % s.row_items, in_chunk = item.index / s.row_items;
  const int64_t first = shape.over_batch ? 0 : item.chunk * s.chunk_samples * shape.groups;
  const int64_t row = first + in_chunk;
  if (row >= (shape.over_batch ? 1 : shape.batch) * shape.groups) return;
  const auto maps = maps_of_row<A>(args, scratch, row);
  const Worker worker{part * device::threads() + device::thread(), s.row_items * device::threads()};
  const Positions positions{worker.index, shape.positions, worker.count};
  const auto end = field(maps, static_cast<int>(row % shape.groups));
  const Stage& stage = s.stage[item.stage];
  for (int i = stage.first_pass; i < stage.end_pass; ++i) {
    if (i > stage.first_pass) device::sync_block();
    const Pass& pass = shape.passes[i];
    if (by_positions(pass))
      run_by_positions<A>(pass, maps, positions, end);
    else
      run_by_lines<A>(pass, maps, worker, end);
  }
}

template <class T, bool ChannelsLast, Form F>
__device__ void forward_apply(const Arguments& args, const Memory<T, F>& memory, const Item& item) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  const ApplyItem at(args, item);
  const Tile whole = at.tile(args, 0);
  load_affine(shape, args.tensors, at.group, whole.channel, whole.channels, whole.position, whole.positions,
              memory.affine);
  A l1 = 0;
  for (int64_t sample = at.samples.begin; sample < at.samples.end; ++sample) {
    if (sample > at.samples.begin) device::sync_block();  // the last result is out
    const Tile tile = at.tile(args, sample);
    const auto maps = maps_of_row<A>(args, kForwardScratchMaps, row_of(shape, sample, at.group));
    copy_in(tile, args.tensors.x, memory.x, device::NoMore());
    if (memory.residual != nullptr) copy_in(tile, args.tensors.residual, memory.residual, device::NoMore());
    fetch(maps, forward_map::mean, shape.summation.present, A(0), tile, memory.local.mean);
    fetch(maps, forward_map::rstd, shape.suppression.present, A(1), tile, memory.local.rstd);
    device::copies_done();
    device::sync_block();
    l1 += Work<T, ChannelsLast, F>::normalize(tile, memory.x, memory.local, memory.affine, args.partials.l1 != nullptr);
    device::sync_block();
    copy_out(tile, memory.x, args.tensors.out, device::NoMore());
  }
  const Stage& stage = args.staged.stage[item.stage];
  store_sum(args.partials.l1, static_cast<int64_t>(item.chunk) * stage.items + item.index, l1, memory.reduction);
}

template <class T, bool ChannelsLast, Form F>
__device__ void backward_apply(const Arguments& args, const Memory<T, F>& memory, const Item& item) {
  using A = Acc<T>;
  using Tiles = Work<T, ChannelsLast, F>;
  const Shape& shape = args.shape;
  const ApplyItem at(args, item);
  const Tile whole = at.tile(args, 0);
  const A l1 = l1_gradient<A>(args.tensors);
  const int sharers = Tiles::sharers(whole);
  load_affine(shape, args.tensors, at.group, whole.channel, whole.channels, whole.position, whole.positions,
              memory.affine);
  clear_gradients(memory.affine, shape.per_position ? whole.positions : whole.channels * sharers);
  for (int64_t sample = at.samples.begin; sample < at.samples.end; ++sample) {
    if (sample > at.samples.begin) device::sync_block();  // the last result is out
    const Tile tile = at.tile(args, sample);
    const auto maps = maps_of_row<A>(args, kBackwardScratchMaps, row_of(shape, sample, at.group));
    copy_in(tile, args.tensors.x, memory.x, device::NoMore());
    copy_in(tile, args.tensors.dy, memory.dy, device::NoMore());
    if (memory.residual != nullptr) copy_in(tile, args.tensors.residual, memory.residual, device::NoMore());
    fetch(maps, backward_map::mean, shape.summation.present, A(0), tile, memory.local.mean);
    fetch(maps, backward_map::rstd, shape.suppression.present, A(1), tile, memory.local.rstd);
    fetch(maps, backward_map::slope, shape.suppression.present, A(0), tile, memory.local.slope);
    fetch(maps, backward_map::offset, shape.summation.present, A(0), tile, memory.local.offset);
    device::copies_done();
    device::sync_block();
    Tiles::differentiate(tile, memory.x, memory.dy, memory.local, memory.affine, l1);
    device::sync_block();
    copy_out(tile, memory.x, args.tensors.out, device::NoMore());
    if (memory.residual != nullptr && args.tensors.dresidual != nullptr)
      copy_out(tile, memory.residual, args.tensors.dresidual, device::NoMore());
  }
  store_gradients(shape, args.partials, at.slot, at.group, whole, sharers, memory.affine);
}

template <class T, bool ChannelsLast, Form F>
__global__ void __launch_bounds__(kStagedThreads, blocks_for(kStagedBlocks, sizeof(T)))
    staged_forward(const __grid_constant__ Arguments args) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  device::let_next_begin();
  device::wait_for_launch_before();
  clear_counters(args.partials);
  const Item item = Item::next(args.staged);
  if (item.stage < 0) return;
  item.wait(args.staged);
  const Memory<T, F> memory(shape, args.shared);
  switch (args.staged.stage[item.stage].kind) {
    case StageKind::statistics: forward_statistics<T, ChannelsLast>(args, memory, item); break;
    case StageKind::merge: shape.whole ? forward_merge_whole(args, memory, item) : forward_merge<A>(args, item); break;
    case StageKind::passes:
      staged_passes<A>(args, item, kForwardScratchMaps, [&](const GlobalMaps<A>& maps, int group) {
        return ForwardFields<F, A, GlobalMaps<A>>{shape, maps, sigma_of<A>(args.tensors, group)};
      });
      break;
    case StageKind::deviations:
      if constexpr (F == Form::general) forward_deviations<T, ChannelsLast>(args, memory, item);
      break;
    case StageKind::merge_deviations:
      if constexpr (F == Form::general)
        shape.whole ? merge_deviations_whole(args, memory, item) : merge_deviations<A>(args, item);
      break;
    case StageKind::apply:
      forward_apply<T, ChannelsLast>(args, Memory<T, F>(shape, args.staged.apply_shared), item);
      break;
  }
  item.done(args.staged);
}

template <class T, bool ChannelsLast, Form F>
__global__ void __launch_bounds__(kStagedThreads, blocks_for(kStagedBlocks, sizeof(T)))
    staged_backward(const __grid_constant__ Arguments args) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  device::let_next_begin();
  device::wait_for_launch_before();
  clear_counters(args.partials);
  const Item item = Item::next(args.staged);
  if (item.stage < 0) return;
  item.wait(args.staged);
  const Memory<T, F> memory(shape, args.shared);
  const Stage& stage = args.staged.stage[item.stage];
  A dsigma = 0;
  switch (stage.kind) {
    case StageKind::statistics: dsigma = backward_statistics<T, ChannelsLast>(args, memory, item); break;
    case StageKind::merge:
      if (shape.whole)
        backward_merge_whole(args, memory, item);
      else
        dsigma = backward_merge<F, A>(args, item);
      break;
    case StageKind::passes:
      staged_passes<A>(args, item, kBackwardScratchMaps, [&](const GlobalMaps<A>& maps, int) {
        const A samples = shape.over_batch ? static_cast<A>(shape.batch) : A(1);
        return BackwardFields<A, GlobalMaps<A>>{shape, maps, A(1) / (static_cast<A>(shape.group_channels) * samples)};
      });
      break;
    case StageKind::apply:
      backward_apply<T, ChannelsLast>(args, Memory<T, F>(shape, args.staged.apply_shared), item);
      break;
    default: break;  // of forward alone
  }
  const bool final_statistics = stage.kind == (shape.over_batch ? StageKind::merge : StageKind::statistics);
  if (final_statistics && shape.statistics && !shape.whole) {
    const StatisticsItem at(args, item);
    const int64_t slots = static_cast<int64_t>(args.staged.chunks) * (stage.items / shape.groups);
    const int64_t slot = static_cast<int64_t>(item.chunk) * (stage.items / shape.groups) +
                         static_cast<int64_t>(at.unit) * at.tiles + at.tile;
    store_sum(args.partials.dsigma, at.group * slots + slot, signed_dsigma<F>(args, at.group, dsigma),
              memory.reduction);
  }
  item.done(args.staged);
}

}  // namespace divnorm::cuda
