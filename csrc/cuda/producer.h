// The warp that copies: chunks of the coming samples into the ring, and results out of it.
#pragma once

#include "ring.h"

namespace divnorm::cuda {

// A place among all chunks of a block, sample by sample.
struct ChunkOf {
  __device__ void next(const Resident& r, const Portion& portion, int slots) {
    turn.next(slots);
    if (++chunk < portion.chunks) return;
    chunk = 0;
    sample += r.parts;
  }
  int64_t sample;
  int chunk = 0;
  Turn turn = {};
};

// Calls body(byte in the chunk, byte in the tensor, bytes) for every contiguous run of a chunk.
template <class T, class Body>
__device__ void for_each_stretch(const Tile& tile, Body&& body) {
  const int bytes = tile.row * static_cast<int>(sizeof(T));
  for (int row = 0; row < tile.rows; ++row)
    body(row * bytes, (tile.first + row * tile.pitch) * static_cast<int64_t>(sizeof(T)), bytes);
}

// Tensors of a call in the order of a slot's chunks, and where their results go; null: nowhere.
constexpr int kMostTensors = 3;
struct Copied {
  const void* in[kMostTensors];
  void* out[kMostTensors];
};

// By one thread. A slot is loaded again when its results have been read from it, so that a sample hands its room on
// chunk by chunk.
template <class T>
__device__ void copy_chunks(const Arguments& args, const Place& place, const Portion& portion, const Ring& ring,
                            const Copied& tensors) {
  const Resident& r = args.resident;
  const int64_t batch = args.shape.batch;
  const auto hand_out = [&](const ChunkOf& at) {
    device::wait(ring.done(at.turn.slot), at.turn.parity());
    const Tile tile = portion.chunk(at.sample, at.chunk);
#pragma unroll
    for (int tensor = 0; tensor < kMostTensors; ++tensor) {
      if (tensors.out[tensor] == nullptr) continue;
      const auto* from = ring.chunk<unsigned char>(at.turn.slot, tensor);
      auto* const to = static_cast<unsigned char*>(tensors.out[tensor]);
      for_each_stretch<T>(
          tile, [&](int here, int64_t there, int bytes) { device::copy_bulk_out(to + there, from + here, bytes); });
    }
  };
  ChunkOf coming{place.part}, leaving{place.part};
  for (; coming.sample < batch; coming.next(r, portion, ring.slots)) {
    const int slot = coming.turn.slot;
    if (coming.turn.round > 0) {
      hand_out(leaving);
      leaving.next(r, portion, ring.slots);
      device::commit_copies_out();
      device::copies_out_read<0>();
    }
    const Tile tile = portion.chunk(coming.sample, coming.chunk);
    device::arrive_expecting(ring.full(slot),
                             args.pipeline.tensors * tile.rows * tile.row * static_cast<int>(sizeof(T)));
#pragma unroll
    for (int tensor = 0; tensor < kMostTensors; ++tensor) {
      if (tensor >= args.pipeline.tensors) break;
      const auto* from = static_cast<const unsigned char*>(tensors.in[tensor]);
      auto* const to = ring.chunk<unsigned char>(slot, tensor);
      for_each_stretch<T>(tile, [&](int here, int64_t there, int bytes) {
        device::copy_bulk(to + here, from + there, bytes, ring.full(slot));
      });
    }
  }
  for (; leaving.sample < batch; leaving.next(r, portion, ring.slots)) hand_out(leaving);
  device::commit_copies_out();
  device::copies_out_done<0>();
}

}  // namespace divnorm::cuda
