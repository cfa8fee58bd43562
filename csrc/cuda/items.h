// The items of work that the two-pass kernels take one after the other, and what each of them is about.
#pragma once

#include "whole.h"

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
  const int64_t positions = args.shape.map_positions;
  return {static_cast<A*>(args.staged.maps) + row * positions, args.staged.map_rows * positions, scratch,
          SavedMaps<A>(args.shape, args.tensors, row)};
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

// Of whole fields: the row of item `index` of a chunk's merges, and where tile number `part` of it leaves its totals.
// Over the batch the tiles of all units follow each other.
struct WholeRow {
  __device__ WholeRow(const Arguments& args, const Item& item)
      : WholeRow(args,
                 args.shape.over_batch ? 0 : item.chunk * args.staged.chunk_samples + item.index / args.shape.groups,
                 item.index % args.shape.groups) {}
  __device__ WholeRow(const Arguments& args, int64_t sample, int group)
      : group(group), tiles((args.shape.positions - 1) / args.staged.tile_positions + 1), sample(sample) {}
  __device__ int parts(const Arguments& args) const { return tiles * (args.shape.over_batch ? args.staged.units : 1); }
  template <class A>
  __device__ A* totals(const Arguments& args, int part) const {
    const int64_t unit = args.shape.over_batch ? part / tiles : sample;
    return static_cast<A*>(args.staged.merged) +
           ((unit * args.shape.groups + group) * tiles + part % tiles) * static_cast<int64_t>(kTotals);
  }
  int group, tiles;
  int64_t sample;
};

// Over the batch: where unit `unit` leaves map `map` of its statistics.
template <class A>
__device__ A* merged_at(const Arguments& args, int map, int maps, int unit, int group, int position) {
  return static_cast<A*>(args.staged.merged) +
         ((static_cast<int64_t>(unit) * args.shape.groups + group) * maps + map) * args.shape.positions + position;
}

// An item of the last stage: the samples of a span, a tile of a group.
struct ApplyItem {
  __device__ ApplyItem(const Arguments& args, const Item& item) : samples(args.shape, args.staged, item.chunk, 0, 0) {
    const Shape& shape = args.shape;
    const Staged& s = args.staged;
    const int tiles = (shape.positions - 1) / s.apply_positions + 1;
    const int channel_tiles = (shape.group_channels - 1) / s.apply_channels + 1;
    const int position_tile = item.index % tiles, rest = item.index / tiles;
    const int span = rest / channel_tiles / shape.groups;
    channel = rest % channel_tiles * s.apply_channels;
    group = rest / channel_tiles % shape.groups;
    position = position_tile * s.apply_positions;
    samples = Samples(shape, s, item.chunk, span, s.span_samples);
    part_of_row = item.index % (tiles * channel_tiles) + (shape.over_batch ? span * tiles * channel_tiles : 0);
    slot = static_cast<int64_t>(item.chunk) * s.spans + span;
    if (!shape.per_position) slot = slot * tiles + position_tile;
  }
  __device__ Tile tile(const Arguments& args, int64_t sample) const {
    const Staged& s = args.staged;
    return tile_at(args.shape, sample, group, channel, s.apply_channels, position, s.apply_positions);
  }
  Samples samples;
  int group, channel, position;
  int64_t slot;  // of the partial sums of weight's and bias' gradients
  int part_of_row;
};

}  // namespace divnorm::cuda
