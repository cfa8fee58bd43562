// Rows of any size, and statistics over the batch: x is read twice, the second time from the second-level cache.
//
// One launch does all stages. A block takes one item of work by a ticket; items are numbered so that an item depends on
// lower numbers alone, so that whatever it waits for is done or at work. Samples go through in chunks: the last stage
// of a chunk follows a few chunks after the first, while the chunk is in the cache.
#pragma once

#include "block.h"

namespace divnorm::cuda {

struct Item {
  int stage = -1;  // -1: there is nothing to do
  int chunk = 0;
  int index = 0;

  // By one thread, seen by all after the barrier.
  static __device__ Item next(const Staged& s) {
    int* ticket = reinterpret_cast<int*>(device::shared_memory());
    if (device::thread() == 0) *ticket = device::take_ticket(s.counters);
    device::sync_block();
    const int number = *ticket, step = number / s.items;
    device::sync_block();
    Item item;
    int index = number - step * s.items, stage = 0;
    while (index >= s.stage[stage].items) index -= s.stage[stage++].items;
    item.chunk = step - s.stage[stage].lag;
    item.index = index;
    if (item.chunk >= 0 && item.chunk < s.chunks) item.stage = stage;
    return item;
  }
  __device__ int* counter(const Staged& s, int of_stage) const { return s.counters + 1 + of_stage * s.chunks + chunk; }
  __device__ void wait(const Staged& s) const {
    if (stage == 0) return;
    if (device::thread() == 0) device::wait_for(counter(s, stage - 1), s.stage[stage - 1].items);
    device::sync_block();
  }
  __device__ void done(const Staged& s) const {
    device::sync_block();
    if (device::thread() == 0) device::signal(counter(s, stage));
  }
};

// Samples begin..end of a chunk's set number i.
struct Samples {
  __device__ Samples(const Shape& shape, const Staged& s, int chunk, int i, int64_t each) {
    const int64_t chunk_begin = chunk * s.chunk_samples;
    const int64_t chunk_end = chunk_begin + s.chunk_samples < shape.batch ? chunk_begin + s.chunk_samples : shape.batch;
    begin = chunk_begin + i * each;
    end = begin + each < chunk_end ? begin + each : chunk_end;
  }
  int64_t begin, end;
};

template <class A>
__device__ GlobalMaps<A> maps_of_row(const Arguments& args, int scratch, int64_t row) {
  return {static_cast<A*>(args.staged.maps) + row * args.shape.positions, args.staged.map_rows * args.shape.positions,
          scratch, SavedMaps<A>(args.shape, args.tensors, row)};
}

__device__ inline int64_t row_of(const Shape& shape, int64_t sample, int group) {
  return (shape.over_batch ? 0 : sample * shape.groups) + group;
}

// A statistics item: the positions of a tile, all channels of a group, the samples of a unit.
struct StatisticsItem {
  __device__ StatisticsItem(const Arguments& args, const Item& item)
      : tiles((args.shape.positions - 1) / args.staged.tile_positions + 1),
        tile(item.index % tiles),
        group(item.index / tiles % args.shape.groups),
        unit(item.index / tiles / args.shape.groups),
        position(tile * args.staged.tile_positions),
        positions(clamped(args.shape.positions - position, 0, args.staged.tile_positions)),
        samples(args.shape, args.staged, item.chunk, unit, args.staged.unit_samples) {}
  int tiles, tile, group, unit, position, positions;
  Samples samples;
};

// Over the batch: where unit `unit` leaves map `map` of its statistics.
template <class A>
__device__ A* merged_at(const Arguments& args, int map, int maps, int unit, int group, int position) {
  return static_cast<A*>(args.staged.merged) +
         ((static_cast<int64_t>(unit) * args.shape.groups + group) * maps + map) * args.shape.positions + position;
}

template <class T, bool ChannelsLast>
__device__ void forward_statistics(const Arguments& args, const Memory<T>& memory, const Item& item) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  const Staged& s = args.staged;
  const StatisticsItem at(args, item);
  const int slices = s.slices, pitch = memory.pitch;
  A* mean = memory.owned;
  A* squares = memory.owned + pitch;
  A counted = 0;
  for (int64_t sample = at.samples.begin; sample < at.samples.end; ++sample)
    for (int channel = 0; channel < shape.group_channels; channel += s.tile_channels) {
      const Tile tile = tile_at(shape, sample, at.group, channel, s.tile_channels, at.position, at.positions);
      copy_in(tile, args.tensors.x, memory.x);
      device::copies_done();
      device::sync_block();
      Work<T, ChannelsLast>::moments(tile, memory.x, shape.summation.present, slices, memory.partial, pitch);
      device::sync_block();
      for (int p = device::thread(); p < tile.positions; p += device::threads()) {
        const auto whole = Moments<A>::merged(slices + 1, [&](int i) {
          if (i == slices) return counted > A(0) ? Moments<A>{counted, mean[p], squares[p]} : Moments<A>{0, 0, 0};
          return Moments<A>{static_cast<A>(slice_channels(tile.channels, i, slices)), memory.partial[i * pitch + p],
                            memory.partial[(slices + i) * pitch + p]};
        });
        mean[p] = whole.mean;
        squares[p] = whole.squares;
      }
      counted += static_cast<A>(tile.channels);
    }
  if (at.samples.begin >= at.samples.end) return;
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

template <class T, bool ChannelsLast>
__device__ Acc<T> backward_statistics(const Arguments& args, const Memory<T>& memory, const Item& item) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  const Staged& s = args.staged;
  const StatisticsItem at(args, item);
  const int slices = s.slices, pitch = memory.pitch;
  const A l1 = l1_gradient<A>(shape, args.tensors);
  fill(memory.owned, kBackwardStatistics * pitch, A(0));
  for (int64_t sample = at.samples.begin; sample < at.samples.end; ++sample) {
    const auto maps = maps_of_row<A>(args, kBackwardScratchMaps, row_of(shape, sample, at.group));
    for (int channel = 0; channel < shape.group_channels; channel += s.tile_channels) {
      const Tile tile = tile_at(shape, sample, at.group, channel, s.tile_channels, at.position, at.positions);
      copy_in(tile, args.tensors.x, memory.x);
      copy_in(tile, args.tensors.dy, memory.dy);
      if (channel == 0) {
        fetch(maps, backward_map::mean, shape.summation.present, A(0), tile, memory.local.mean);
        fetch(maps, backward_map::rstd, shape.suppression.present, A(1), tile, memory.local.rstd);
      }
      load_affine(shape, args.tensors, at.group, tile.channel, tile.channels, tile.position, tile.positions,
                  memory.affine);
      device::copies_done();
      device::sync_block();
      Work<T, ChannelsLast>::sums(tile, memory.x, memory.dy, memory.local, memory.affine, l1, slices, memory.partial,
                                  pitch);
      device::sync_block();
      for (int p = device::thread(); p < tile.positions; p += device::threads())
        for (int k = 0; k < kBackwardStatistics; ++k)
          for (int i = 0; i < slices; ++i) memory.owned[k * pitch + p] += memory.partial[(k * slices + i) * pitch + p];
    }
  }
  if (at.samples.begin >= at.samples.end) return 0;
  A dsigma = 0;
  for (int p = device::thread(); p < at.positions; p += device::threads()) {
    if (shape.over_batch) {
      for (int k = 0; k < kBackwardStatistics; ++k)
        device::store(merged_at<A>(args, k, kBackwardStatistics, at.unit, at.group, at.position + p),
                      memory.owned[k * pitch + p]);
    } else {
      const auto maps = maps_of_row<A>(args, kBackwardScratchMaps, row_of(shape, at.samples.begin, at.group));
      dsigma += start_backward(shape, maps, at.position + p, memory.owned[p], memory.owned[pitch + p],
                               memory.owned[2 * pitch + p]);
    }
  }
  return dsigma;
}

// Over the batch: the statistics of all units become those of the batch, for the positions of a tile.
template <class A>
__device__ void forward_merge(const Arguments& args, const Item& item) {
  const Shape& shape = args.shape;
  const StatisticsItem at(args, item);
  const auto maps = maps_of_row<A>(args, kForwardScratchMaps, at.group);
  for (int p = at.position + device::thread(); p < at.position + at.positions; p += device::threads()) {
    const auto whole = Moments<A>::merged(args.staged.units, [&](int unit) {
      const Samples samples(shape, args.staged, item.chunk, unit, args.staged.unit_samples);
      if (samples.begin >= samples.end) return Moments<A>{0, 0, 0};
      return Moments<A>{static_cast<A>(samples.end - samples.begin) * static_cast<A>(shape.group_channels),
                        device::load(merged_at<A>(args, 0, kForwardStatistics, unit, at.group, p)),
                        device::load(merged_at<A>(args, 1, kForwardStatistics, unit, at.group, p))};
    });
    maps.store(forward_map::mean_of_channels, p, whole.mean);
    maps.store(forward_map::squares, p, whole.squares / whole.count);
  }
}

template <class A>
__device__ A backward_merge(const Arguments& args, const Item& item) {
  const Shape& shape = args.shape;
  const StatisticsItem at(args, item);
  const auto maps = maps_of_row<A>(args, kBackwardScratchMaps, at.group);
  A dsigma = 0;
  for (int p = at.position + device::thread(); p < at.position + at.positions; p += device::threads()) {
    A sums[kBackwardStatistics] = {};
    for (int unit = 0; unit < args.staged.units; ++unit) {
      const Samples samples(shape, args.staged, item.chunk, unit, args.staged.unit_samples);
      if (samples.begin >= samples.end) continue;
      for (int k = 0; k < kBackwardStatistics; ++k)
        sums[k] += device::load(merged_at<A>(args, k, kBackwardStatistics, unit, at.group, p));
    }
    dsigma += start_backward(shape, maps, p, sums[0], sums[1], sums[2]);
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
  const auto end = field(maps, static_cast<int>(row % shape.groups));
  const Stage& stage = s.stage[item.stage];
  for (int i = stage.first_pass; i < stage.end_pass; ++i) {
    if (i > stage.first_pass) device::sync_block();
    run_pass<A>(shape, shape.passes[i], maps, worker, end);
  }
}

// An item of the last stage: the samples of a span, a tile of a group.
struct ApplyItem {
  __device__ ApplyItem(const Arguments& args, const Item& item) : samples(args.shape, args.staged, item.chunk, 0, 0) {
    const Shape& shape = args.shape;
    const Staged& s = args.staged;
    const int tiles = (shape.positions - 1) / s.tile_positions + 1;
    const int channel_tiles = (shape.group_channels - 1) / s.tile_channels + 1;
    const int position_tile = item.index % tiles, rest = item.index / tiles;
    const int span = rest / channel_tiles / shape.groups;
    channel = rest % channel_tiles * s.tile_channels;
    group = rest / channel_tiles % shape.groups;
    position = position_tile * s.tile_positions;
    samples = Samples(shape, s, item.chunk, span, s.span_samples);
    slot = static_cast<int64_t>(item.chunk) * s.spans + span;
    if (!shape.per_position) slot = slot * tiles + position_tile;
  }
  __device__ Tile tile(const Arguments& args, int64_t sample) const {
    return tile_at(args.shape, sample, group, channel, args.staged.tile_channels, position, args.staged.tile_positions);
  }
  Samples samples;
  int group, channel, position;
  int64_t slot;  // of the partial sums of weight's and bias' gradients
};

template <class T, bool ChannelsLast>
__device__ void forward_apply(const Arguments& args, const Memory<T>& memory, const Item& item) {
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
    copy_in(tile, args.tensors.x, memory.x);
    fetch(maps, forward_map::mean, shape.summation.present, A(0), tile, memory.local.mean);
    fetch(maps, forward_map::rstd, shape.suppression.present, A(1), tile, memory.local.rstd);
    device::copies_done();
    device::sync_block();
    l1 += Work<T, ChannelsLast>::normalize(tile, memory.x, memory.local, memory.affine);
    device::sync_block();
    copy_out(tile, memory.x, args.tensors.out);
  }
  const Stage& stage = args.staged.stage[item.stage];
  store_sum(args.partials.l1, static_cast<int64_t>(item.chunk) * stage.items + item.index, l1, memory.reduction);
}

template <class T, bool ChannelsLast>
__device__ void backward_apply(const Arguments& args, const Memory<T>& memory, const Item& item) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  const ApplyItem at(args, item);
  const Tile whole = at.tile(args, 0);
  const A l1 = l1_gradient<A>(shape, args.tensors);
  const int sharers = Work<T, ChannelsLast>::sharers(whole);
  load_affine(shape, args.tensors, at.group, whole.channel, whole.channels, whole.position, whole.positions,
              memory.affine);
  clear_gradients(memory.affine, shape.per_position ? whole.positions : whole.channels * sharers);
  for (int64_t sample = at.samples.begin; sample < at.samples.end; ++sample) {
    if (sample > at.samples.begin) device::sync_block();  // the last result is out
    const Tile tile = at.tile(args, sample);
    const auto maps = maps_of_row<A>(args, kBackwardScratchMaps, row_of(shape, sample, at.group));
    copy_in(tile, args.tensors.x, memory.x);
    copy_in(tile, args.tensors.dy, memory.dy);
    fetch(maps, backward_map::mean, shape.summation.present, A(0), tile, memory.local.mean);
    fetch(maps, backward_map::rstd, shape.suppression.present, A(1), tile, memory.local.rstd);
    fetch(maps, backward_map::slope, shape.suppression.present, A(0), tile, memory.local.slope);
    fetch(maps, backward_map::offset, shape.summation.present, A(0), tile, memory.local.offset);
    device::copies_done();
    device::sync_block();
    Work<T, ChannelsLast>::differentiate(tile, memory.x, memory.dy, memory.local, memory.affine, l1);
    device::sync_block();
    copy_out(tile, memory.x, args.tensors.out);
  }
  store_gradients(shape, args.partials, at.slot, at.group, whole, sharers, memory.affine);
}

template <class T, bool ChannelsLast>
__global__ void __launch_bounds__(kStagedThreads, blocks_for(kStagedBlocks, sizeof(T)))
    staged_forward(const __grid_constant__ Arguments args) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  const Item item = Item::next(args.staged);
  if (item.stage < 0) return;
  item.wait(args.staged);
  const Memory<T> memory(args);
  switch (args.staged.stage[item.stage].kind) {
    case StageKind::statistics: forward_statistics<T, ChannelsLast>(args, memory, item); break;
    case StageKind::merge: forward_merge<A>(args, item); break;
    case StageKind::passes:
      staged_passes<A>(args, item, kForwardScratchMaps, [&](const GlobalMaps<A>& maps, int group) {
        return ForwardFields<A, GlobalMaps<A>>{shape, maps, sigma_of<A>(args.tensors, group)};
      });
      break;
    case StageKind::apply: forward_apply<T, ChannelsLast>(args, memory, item); break;
  }
  item.done(args.staged);
}

template <class T, bool ChannelsLast>
__global__ void __launch_bounds__(kStagedThreads, blocks_for(kStagedBlocks, sizeof(T)))
    staged_backward(const __grid_constant__ Arguments args) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  const Item item = Item::next(args.staged);
  if (item.stage < 0) return;
  item.wait(args.staged);
  const Memory<T> memory(args);
  const Stage& stage = args.staged.stage[item.stage];
  A dsigma = 0;
  switch (stage.kind) {
    case StageKind::statistics: dsigma = backward_statistics<T, ChannelsLast>(args, memory, item); break;
    case StageKind::merge: dsigma = backward_merge<A>(args, item); break;
    case StageKind::passes:
      staged_passes<A>(args, item, kBackwardScratchMaps, [&](const GlobalMaps<A>& maps, int) {
        const A samples = shape.over_batch ? static_cast<A>(shape.batch) : A(1);
        return BackwardFields<A, GlobalMaps<A>>{shape, maps, A(1) / (static_cast<A>(shape.group_channels) * samples)};
      });
      break;
    case StageKind::apply: backward_apply<T, ChannelsLast>(args, memory, item); break;
  }
  const bool final_statistics = stage.kind == (shape.over_batch ? StageKind::merge : StageKind::statistics);
  if (final_statistics && shape.pass_count > 0) {
    const StatisticsItem at(args, item);
    const int64_t slots = static_cast<int64_t>(args.staged.chunks) * (stage.items / shape.groups);
    const int64_t slot = static_cast<int64_t>(item.chunk) * (stage.items / shape.groups) +
                         static_cast<int64_t>(at.unit) * at.tiles + at.tile;
    store_sum(args.partials.dsigma, at.group * slots + slot, dsigma, memory.reduction);
  }
  item.done(args.staged);
}

}  // namespace divnorm::cuda
