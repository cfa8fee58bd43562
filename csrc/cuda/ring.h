// The ring of slots that chunks of a block's portions of the samples pass through, and the barriers of its warps'
// roles.
#pragma once

#include "place.h"
#include "team.h"

namespace divnorm::cuda {

// The slots one after the other, round by round.
struct Turn {
  __device__ void next(int slots) {
    if (++slot < slots) return;
    slot = 0;
    ++round;
  }
  __device__ int parity() const { return round & 1; }
  int slot = 0, round = 0;
};

// What a block holds of a sample, and how it is cut into chunks: contiguous tensors into channels of all of its
// positions, channels_last ones into positions with all of their channels.
struct Portion {
  __device__ Portion(const Arguments& args, const Place& place)
      : args_(args),
        group_(place.group),
        channel(place.channel_slice * args.resident.tile_channels),
        position(place.position_slice * args.resident.tile_positions),
        channels(clamped(args.shape.group_channels - channel, 0, args.resident.tile_channels)),
        positions(clamped(args.shape.positions - position, 0, args.resident.tile_positions)),
        chunks(args.shape.channels_last ? (positions - 1) / args.pipeline.chunk_positions + 1
                                        : (channels - 1) / args.pipeline.chunk_channels + 1) {}
  // Of a sample; it lies in the tensor where that does.
  template <bool ChannelsLast>
  __device__ Tile chunk(int64_t sample, int i) const {
    const Pipeline& p = args_.pipeline;
    Tile tile;
    tile.channel = channel;
    tile.channels = channels;
    tile.position = position;
    tile.positions = positions;
    if constexpr (ChannelsLast) {
      tile.position += i * p.chunk_positions;
      tile.positions = least(positions - i * p.chunk_positions, p.chunk_positions);
    } else {
      tile.channel += i * p.chunk_channels;
      tile.channels = least(channels - i * p.chunk_channels, p.chunk_channels);
    }
    lay_out(tile, args_.shape, ChannelsLast, sample, group_);
    return tile;
  }

 private:
  static __device__ int least(int one, int other) { return one < other ? one : other; }

  const Arguments& args_;
  int group_;

 public:
  int channel, position, channels, positions;  // the first ones, and how many
  int chunks;
};

// What the computing warps do with a block's chunks, in this order. Before the results of a sample, while its maps are
// made, they take the statistics of `ahead` chunks of the next one; then those of another one for each chunk of
// results. The ring has room for no fewer chunks beside a sample's, and what it has more is on its way meanwhile. What
// a step waits for is always behind earlier ones: its slot's last results; or maps, for which every block of the
// cluster has taken statistics before the results in its way.
struct Steps {
  // finish(number of the sample, chunk): results; take(number, chunk): statistics; taken(number): all of them are, and
  // the maps of the sample before are there.
  template <class Finish, class Take, class Taken>
  __device__ void for_each(Finish&& finish, Take&& take, Taken&& taken) const {
    const int last = chunks - 1 - ahead;
#pragma unroll 1
    for (int number = -1; number < samples; ++number) {
      const bool more = number + 1 < samples;
      const int complete = number < 0 || last > 0 ? last : 0;
#pragma unroll 1
      for (int i = -ahead; i < chunks; ++i) {
        if (i >= 0 && number >= 0) finish(number, i);
        if (!more) continue;
        if (i <= last) take(number + 1, i + ahead);
        if (i == complete) taken(number + 1);
      }
    }
  }

  int samples, chunks, ahead;  // the last at most as many as chunks
};

// Slots of shared memory that chunks come into, of one tensor or of several side by side.
class Ring {
 public:
  __device__ Ring(int slots, int tensors, int chunk_bytes, int memory, device::Barrier* barriers)
      : slots(slots),
        chunk_bytes_(chunk_bytes),
        slot_bytes_(chunk_bytes * tensors),
        memory_(device::shared_memory() + memory),
        barriers_(barriers) {}

  // By one thread, before the first barrier of the block. warps: that are done with every slot.
  __device__ void start(int warps) const {
    for (int slot = 0; slot < slots; ++slot) {
      device::init(full(slot), 1);
      device::init(done(slot), warps);
    }
  }

  template <class T>
  __device__ T* chunk(int slot, int tensor) const {
    return reinterpret_cast<T*>(memory_ + slot * slot_bytes_ + tensor * chunk_bytes_);
  }

  // Of a slot: its chunks have come; its results may go, or others come.
  __device__ device::Barrier* full(int slot) const { return barriers_ + slot; }
  __device__ device::Barrier* done(int slot) const { return barriers_ + slots + slot; }

  int slots;

 private:
  int chunk_bytes_, slot_bytes_;
  unsigned char* memory_;
  device::Barrier* barriers_;
};

// What roles and blocks say of samples.
class Signals {
 public:
  __device__ explicit Signals(device::Barrier* barriers) : barriers_(barriers) {}

  // As Ring::start().
  __device__ void start(int warps, bool of_saved) const {
    device::init(statistics(), warps);
    device::init(maps(), 1);
    for (int number = 0; number < 2; ++number) {
      device::init(received(number), 1);
      if (of_saved) device::init(saved(number), 1);
    }
  }

  // Of every sample: its partial statistics are in place; its maps are.
  __device__ device::Barrier* statistics() const { return barriers_; }
  __device__ device::Barrier* maps() const { return barriers_ + 1; }
  // Of every other one: what backward needs of forward's maps is in place; the blocks' statistics have come.
  __device__ device::Barrier* saved(int number) const { return barriers_ + 2 + (number & 1); }
  __device__ device::Barrier* received(int number) const { return barriers_ + 4 + (number & 1); }

 private:
  device::Barrier* barriers_;
};

// One warp's arrival, behind what all of its threads have done.
__device__ inline void arrive_as_warp(device::Barrier* barrier) {
  device::sync_warp();
  if (device::thread() % device::kWarp == 0) device::arrive(barrier);
}

}  // namespace divnorm::cuda
