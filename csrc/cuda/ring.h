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

// What the computing warps do with a block's chunks, in this order. Before the results of a sample, while its maps are
// made, they take the statistics of `ahead` chunks of the next one; then those of another one for each chunk of
// results. The ring has room for no fewer chunks beside a sample's, and what it has more is on its way meanwhile. What
// a step waits for is always behind earlier ones: its slot's last results; or maps, for which every block of the
// cluster has taken statistics before the results in its way.
class Steps {
 public:
  __device__ Steps(int samples, int chunks, int ahead) : samples_(samples), chunks_(chunks), ahead_(ahead) {}

  __device__ bool next() {
    for (; of_results_ < samples_; ++of_results_, taken_ = finished_ = 0) {  // at first there are no results
      const bool more = of_results_ + 1 < samples_ && taken_ < chunks_;
      takes = more && (of_results_ < 0 || taken_ < ahead_ + finished_);
      if (!takes && (of_results_ < 0 || finished_ == chunks_)) continue;
      number = takes ? of_results_ + 1 : of_results_;
      chunk = takes ? taken_++ : finished_++;
      return true;
    }
    return false;
  }
  // Whether this step leaves nothing of the next sample to be taken, nor the maps of this one to be waited for.
  __device__ bool complete() const {
    return of_results_ + 1 < samples_ && taken_ == chunks_ && (of_results_ < 0 || finished_ > 0);
  }

  // That whose statistics are taken beside the results of another.
  __device__ int next_sample() const { return of_results_ + 1; }

  bool takes = false;  // statistics, else results
  int number = 0, chunk = 0;

 private:
  int samples_, chunks_, ahead_;
  int of_results_ = -1, taken_ = 0, finished_ = 0;
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
  __device__ device::Barrier* saved(int number) const { return barriers_ + 2 + number % 2; }
  __device__ device::Barrier* received(int number) const { return barriers_ + 4 + number % 2; }

 private:
  device::Barrier* barriers_;
};

// One warp's arrival, behind what all of its threads have done.
__device__ inline void arrive_as_warp(device::Barrier* barrier) {
  device::sync_warp();
  if (device::thread() % device::kWarp == 0) device::arrive(barrier);
}

}  // namespace divnorm::cuda
