// Maps of a block's own positions and of those around them that its windows reach, and the exchange of the statistics
// that they start from. Blocks push these to whom they concern, which is waited for at a barrier in the receiver's
// memory; what neighbours both need they both compute.
#pragma once

#include "block.h"
#include "ring.h"

namespace divnorm::cuda {

// The first position that the maps of a block with this slice of the positions have room for.
__device__ inline int first_of_maps(const Arguments& args, int position_slice) {
  return args.pipeline.everywhere ? 0 : position_slice * args.resident.tile_positions - args.pipeline.margin;
}

// A sample's maps in a block: what it has received; what passes work on, of all samples; and the two results, of the
// block's own positions alone.
template <class A>
struct HaloMaps {
  A *received, *working, *results;
  int spare;                          // the number of the first map behind those received
  int pitch, begin;                   // numbers of a map, and the position that its first one is of
  int own_pitch, own_begin, own_end;  // of a result
  bool saves;                         // whether results are saved by this block
  SavedMaps<A> saved;

  __device__ A* at(int map, int p) const {
    return (map < spare ? received + map * pitch : map == spare ? working : working + pitch) + p - begin;
  }
  __device__ A load(int map, int p) const { return *at(map, p); }
  __device__ void store(int map, int p, A value) const { *at(map, p) = value; }
  __device__ A sum(int map, int first, int last, int step) const {
    A sum = 0;
#pragma unroll 4
    for (int p = first; p <= last; p += step) sum += load(map, p);
    return sum;
  }
  // A result, which passes read no more.
  __device__ void keep(int map, int p, A value) const {
    if (p >= own_begin && p < own_end) results[(map - spare - 1) * own_pitch + p - own_begin] = value;
  }
  __device__ void save(int map, int p, A value) const {
    keep(map, p, value);
    if (saves && p >= own_begin && p < own_end) saved.store(map == forward_map::mean, p, value);
  }
};

// The maps of a row of whole fields: one number each, which every thread keeps for itself.
template <class A>
struct RowMaps {
  A* numbers;
  bool saves;
  SavedMaps<A> saved;

  __device__ A load(int map, int) const { return numbers[map]; }
  __device__ void store(int map, int, A value) const { numbers[map] = value; }
  __device__ void save(int map, int p, A value) const {
    store(map, p, value);
    if (saves) saved.store(map == forward_map::mean, p, value);
  }
};

// The statistics of positions by the blocks of a cluster. Two samples have room for theirs, in turns: a block pushes
// those of sample s + 2 when it has all of s + 1, among them its receivers', for reach is the same to both sides; and
// these had done with s when they pushed s + 1.
template <class A>
class Exchange {
 public:
  // received, totals: of two samples, in shared memory. maps: that each slice of the channels has there; statistics: of
  // a position, that are sent.
  __device__ Exchange(const Arguments& args, const Place& place, const Portion& portion, const Signals& signals,
                      A* received, A* totals, int maps, int statistics)
      : args_(args),
        place_(place),
        signals_(signals),
        received_(received),
        totals_(totals),
        maps_(maps),
        statistics_(statistics) {
    const Pipeline& p = args.pipeline;
    const int all = args.shape.positions, own_end = portion.position + portion.positions;
    begin = p.everywhere ? 0 : clamped(portion.position - p.reach, 0, all);
    end = p.everywhere ? all : clamped(own_end + p.reach, 0, all);
    first_ = begin / args.resident.tile_positions;
    last_ = (end - 1) / args.resident.tile_positions;
  }

  // By one thread, once for every sample.
  __device__ void expect(int number) const {
    const int numbers = args_.shape.whole ? args_.resident.blocks * kTotals
                                          : args_.resident.channel_blocks * statistics_ * (end - begin);
    device::arrive_expecting(signals_.received(number), numbers * static_cast<int>(sizeof(A)));
  }

  // Statistic `which` of one of the block's own positions.
  __device__ void push(int number, int which, int p, A value) const {
    const Pipeline& of = args_.pipeline;
    const Resident& r = args_.resident;
    A* const map = received_ + (number & 1) * of.received + map_of(place_.channel_slice, which) * of.pitch;
    for (int slice = first_; slice <= last_; ++slice) {
      const int from = slice * r.tile_positions;
      if (!of.everywhere && (p < from - of.reach || p >= from + r.tile_positions + of.reach)) continue;
      for (int block = 0; block < r.channel_blocks; ++block)
        device::store_async(map + p - first_of_maps(args_, slice), value, slice * r.channel_blocks + block,
                            signals_.received(number));
    }
  }
  // Where the block with slice `slice` of the channels has put it.
  __device__ A load(const HaloMaps<A>& maps, int slice, int which, int p) const {
    return maps.received[map_of(slice, which) * maps.pitch + p - maps.begin];
  }

  // Of whole fields: what the block adds to its row, by as many threads as there are blocks, each to one of them.
  __device__ void push_totals(int number, int to, A first, A second, A third) const {
    if (to >= args_.resident.blocks) return;
    A* const at = totals_of(number, place_.rank);
    device::store_async(at, first, to, signals_.received(number));
    device::store_async(at + 1, second, to, signals_.received(number));
    device::store_async(at + 2, third, to, signals_.received(number));
  }
  __device__ A total(int number, int block, int which) const { return totals_of(number, block)[which]; }

  __device__ void wait(int number) const { device::wait_for_cluster(signals_.received(number), number >> 1 & 1); }

  int begin, end;  // positions whose statistics the block needs

 private:
  __device__ int map_of(int slice, int which) const { return slice * maps_ + which; }
  __device__ A* totals_of(int number, int block) const {
    return totals_ + ((number & 1) * args_.resident.blocks + block) * kTotals;
  }

  const Arguments& args_;
  const Place& place_;
  const Signals& signals_;
  A *received_, *totals_;
  int maps_, statistics_;
  int first_, last_;  // slices of the positions that lie there
};

// All passes of a sample. field: what ends a field.
template <class A, class Team, class Field>
__device__ void run_halo_passes(const Shape& shape, bool everywhere, const HaloMaps<A>& maps, const Portion& portion,
                                const Team& team, const Field& field) {
  int low = 0, high = 0;  // of the block's positions, which later passes need
  for (int i = 0; i < shape.pass_count; ++i) {
    low += shape.passes[i].lo * shape.passes[i].inner;
    high += shape.passes[i].hi * shape.passes[i].inner;
  }
  for (int i = 0; i < shape.pass_count; ++i) {
    const Pass& pass = shape.passes[i];
    low -= pass.lo * pass.inner;
    high -= pass.hi * pass.inner;
    if (by_positions(pass)) {
      const int first = everywhere ? 0 : clamped(portion.position - low, 0, shape.positions);
      const int end =
          everywhere ? shape.positions : clamped(portion.position + portion.positions + high, 0, shape.positions);
      run_by_positions<A>(pass, maps, Positions{first + team.index(), end, team.count()}, field);
    } else {
      run_by_lines<A>(pass, maps, Worker{team.index(), team.count()}, field);
    }
    team.sync();
  }
}

}  // namespace divnorm::cuda
