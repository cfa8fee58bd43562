// The warp that copies: chunks of the coming samples into the ring, and results out of it.
#pragma once

#include "pipeline_roles.h"

namespace divnorm::cuda {

// Calls body(in the chunk, in the tensor, bytes) for every contiguous run of a chunk, by the warp's elected thread.
template <class T, class Byte, class Body>
__device__ void for_each_stretch(const Tile& tile, unsigned char* chunk, Byte* tensor, Body&& body) {
  const int bytes = tile.row * static_cast<int>(sizeof(T));
  const int64_t pitch = tile.pitch * static_cast<int64_t>(sizeof(T));
  tensor += tile.first * static_cast<int64_t>(sizeof(T));
  for (int row = 0; row < tile.rows; ++row, chunk += bytes, tensor += pitch)
    if (device::elected()) body(chunk, tensor, bytes);
}

// Tensors of a call in the order of a slot's chunks, and where their results go; null: nowhere.
constexpr int kMostTensors = 3;
struct Copied {
  const void* in[kMostTensors];
  void* out[kMostTensors];
  const void* again;  // what comes once more with the results, through a ring of its own
};

// By the warp that copies, in the order of the computing warps, as far ahead of them as there are slots. A slot is
// loaded again when its results have been read from it, so that a sample hands its room on chunk by chunk.
template <class T, Form F>
__device__ void copy_chunks(const Pipelined<T, F>& block, const Copied& tensors) {
  const Ring &ring = block.ring, &again = block.again;
  const Portion& portion = block.portion;
  const auto load = [&](const void* tensor, const Tile& tile, unsigned char* to, device::Barrier* full, auto cached) {
    for_each_stretch<T>(tile, to, static_cast<const unsigned char*>(tensor),
                        [&](unsigned char* shared, const unsigned char* global, int bytes) {
                          device::copy_bulk(shared, global, bytes, full, cached);
                        });
  };
  Turn coming, leaving, passing;
  int left = 0;  // chunks whose results are on their way
  const auto hand_out = [&] {
    device::wait(ring.done(leaving.slot), leaving.parity());
    const Tile tile = portion.chunk(block.sample(left / portion.chunks), left % portion.chunks);
#pragma unroll
    for (int tensor = 0; tensor < kMostTensors; ++tensor) {
      if (tensors.out[tensor] == nullptr) continue;
      for_each_stretch<T>(tile, ring.chunk<unsigned char>(leaving.slot, tensor),
                          static_cast<unsigned char*>(tensors.out[tensor]),
                          [&](const unsigned char* shared, unsigned char* global, int bytes) {
                            device::copy_bulk_out(global, shared, bytes);
                          });
    }
    leaving.next(ring.slots);
    ++left;
  };
  for (Steps steps = block.steps(); steps.next();) {
    const Tile tile = portion.chunk(block.sample(steps.number), steps.chunk);
    const int bytes = tile.rows * tile.row * static_cast<int>(sizeof(T));
    if (steps.takes) {
      if (coming.round > 0) {
        hand_out();
        if (device::elected()) {
          device::commit_copies_out();
          device::copies_out_read<0>();
        }
      }
      device::Barrier* const full = ring.full(coming.slot);
      if (device::elected()) device::arrive_expecting(full, block.args.pipeline.tensors * bytes);
#pragma unroll
      for (int tensor = 0; tensor < kMostTensors; ++tensor)
        if (tensor < block.args.pipeline.tensors)
          load(tensors.in[tensor], tile, ring.chunk<unsigned char>(coming.slot, tensor), full, device::AsUsual());
      coming.next(ring.slots);
    }
    if (again.slots == 0) continue;
    if (passing.round > 0) device::wait(again.done(passing.slot), (passing.round - 1) % 2);
    device::Barrier* const full = again.full(passing.slot);
    if (device::elected()) device::arrive_expecting(full, bytes);
    auto* const to = again.chunk<unsigned char>(passing.slot, 0);
    if (steps.takes)
      load(tensors.again, tile, to, full, device::Again(true));
    else
      load(tensors.again, tile, to, full, device::NoMore());
    passing.next(again.slots);
  }
  while (left < block.samples() * portion.chunks) hand_out();
  if (device::elected()) {
    device::commit_copies_out();
    device::copies_out_done<0>();
  }
}

}  // namespace divnorm::cuda
