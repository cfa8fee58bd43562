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
  __device__ int parity() const { return round % 2; }
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
  __device__ Tile chunk(int64_t sample, int i) const {
    const Pipeline& p = args_.pipeline;
    const bool last = args_.shape.channels_last;
    const int from_channel = last ? 0 : i * p.chunk_channels, from_position = last ? i * p.chunk_positions : 0;
    return tile_at(args_.shape, sample, group_, channel + from_channel,
                   clamped(channels - from_channel, 0, p.chunk_channels), position + from_position,
                   clamped(positions - from_position, 0, p.chunk_positions));
  }

 private:
  const Arguments& args_;
  int group_;

 public:
  int channel, position, channels, positions;  // the first ones, and how many
  int chunks;
};

// A block's barriers, in shared memory.
class Ring {
 public:
  __device__ explicit Ring(const Pipeline& p)
      : slots(p.slots),
        chunk_bytes_(p.chunk_bytes),
        slot_bytes_(p.chunk_bytes * p.tensors),
        memory_(device::shared_memory() + p.ring),
        barriers_(reinterpret_cast<device::Barrier*>(device::shared_memory() + p.barriers)) {}

  // By one thread, before the first barrier of the block.
  __device__ void start(const Pipeline& p) const {
    const int warps = p.compute_threads / device::kWarp;
    for (int slot = 0; slot < slots; ++slot) {
      device::init(full(slot), 1);
      device::init(done(slot), warps);
    }
    device::init(statistics(), warps);
    device::init(maps(), 1);
    for (int number = 0; number < 2; ++number) {
      device::init(received(number), 1);
      if (p.saved >= 0) device::init(saved(number), 1);
    }
    device::inits_done();
  }

  template <class T>
  __device__ T* chunk(int slot, int tensor) const {
    return reinterpret_cast<T*>(memory_ + slot * slot_bytes_ + tensor * chunk_bytes_);
  }

  // Of a slot: its chunks have come; its results may go.
  __device__ device::Barrier* full(int slot) const { return barriers_ + slot; }
  __device__ device::Barrier* done(int slot) const { return barriers_ + slots + slot; }
  // Of every sample: its partial statistics are in place; its maps are.
  __device__ device::Barrier* statistics() const { return barriers_ + 2 * slots; }
  __device__ device::Barrier* maps() const { return barriers_ + 2 * slots + 1; }
  // Of every other one: what backward needs of forward's maps is in place; the blocks' statistics have come.
  __device__ device::Barrier* saved(int number) const { return barriers_ + 2 * slots + 2 + number % 2; }
  __device__ device::Barrier* received(int number) const { return barriers_ + 2 * slots + 4 + number % 2; }

  static constexpr int kBarriersOfSamples = 6;
  int slots;

 private:
  int chunk_bytes_, slot_bytes_;
  unsigned char* memory_;
  device::Barrier* barriers_;
};

// One warp's arrival, behind what all of its threads have done.
__device__ inline void arrive_as_warp(device::Barrier* barrier) {
  device::sync_warp();
  if (device::thread() % device::kWarp == 0) device::arrive(barrier);
}

}  // namespace divnorm::cuda
