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
#pragma unroll 1
  for (int row = 0; row < tile.rows; ++row, chunk += bytes, tensor += pitch)
    if (device::elected()) body(chunk, tensor, bytes);
}

// The boxes of a block's chunks.
template <class T>
class BoxesOfBlock {
 public:
  __device__ BoxesOfBlock(const Arguments& args, const Place& place, const Portion& portion) {
    const Shape& shape = args.shape;
    const bool last = args.pipeline.boxes[1].rows > 0 && place.position_slice == args.resident.position_blocks - 1;
    which = last ? 1 : 0;
    boxes_ = args.pipeline.boxes[which];
    const int first = shape.channels_last ? place.group * shape.group_channels : portion.position;
    word_ = first * static_cast<int>(sizeof(T)) / kBoxWord;
  }
  // Whether chunks are boxes; else they are stretches.
  __device__ bool any() const { return boxes_.rows > 0; }
  // Calls body(in the chunk, corner) for every box of a chunk, by the warp's elected thread.
  template <class Body>
  __device__ void for_each(const Tile& tile, unsigned char* chunk, Body&& body) const {
    const auto row = static_cast<int>(tile.line);
    const int bytes = boxes_.rows * boxes_.row_bytes;
#pragma unroll 1
    for (int i = 0; i < tile.rows; i += boxes_.rows, chunk += bytes)
      if (device::elected()) body(chunk, Corner{word_, row + i});
  }

  int which;  // of a tensor's maps

 private:
  Boxes boxes_;
  int word_;
};

// The tensors of a slot's chunks, in their order, and where their results go, as boxed:: numbers them.
constexpr int kMostTensors = 3;
struct Copied {
  int in[kMostTensors], out[kMostTensors];
  int again;  // what comes once more with the results, through a ring of its own
};

// Null: it is not there, or not wanted.
__device__ inline const void* tensor_of(const Tensors& tensors, int which) {
  return which == boxed::x           ? tensors.x
         : which == boxed::dy        ? tensors.dy
         : which == boxed::residual  ? tensors.residual
         : which == boxed::out       ? tensors.out
         : which == boxed::dresidual ? tensors.dresidual
                                     : nullptr;
}

// By the warp that copies, in the order of the computing warps, as far ahead of them as there are slots. A slot is
// loaded again when its results have been read from it, so that a sample hands its room on chunk by chunk.
template <class T, bool ChannelsLast, Form F>
__device__ void copy_chunks(const Pipelined<T, ChannelsLast, F>& block, const Copied& tensors) {
  const Ring &ring = block.ring, &again = block.again;
  const Portion& portion = block.portion;
  const BoxesOfBlock<T> boxes(block.args, block.place, portion);
  const auto load = [&](int which, const Tile& tile, unsigned char* to, device::Barrier* full, auto cached) {
    if (boxes.any())
      return boxes.for_each(tile, to, [&](unsigned char* shared, const Corner& at) {
        device::copy_box(shared, block.args.boxed[which][boxes.which], at, full, cached);
      });
    for_each_stretch<T>(tile, to, static_cast<const unsigned char*>(tensor_of(block.args.tensors, which)),
                        [&](unsigned char* shared, const unsigned char* global, int bytes) {
                          device::copy_bulk(shared, global, bytes, full, cached);
                        });
  };
  const auto store = [&](int which, const Tile& tile, unsigned char* from) {
    auto* const tensor = static_cast<unsigned char*>(const_cast<void*>(tensor_of(block.args.tensors, which)));
    if (tensor == nullptr) return;
    if (boxes.any())
      return boxes.for_each(tile, from, [&](const unsigned char* shared, const Corner& at) {
        device::copy_box_out(block.args.boxed[which][boxes.which], at, shared);
      });
    for_each_stretch<T>(tile, from, tensor, [&](const unsigned char* shared, unsigned char* global, int bytes) {
      device::copy_bulk_out(global, shared, bytes);
    });
  };
  Turn coming, leaving, passing;
  int left = 0, of_left = 0;  // the chunk whose results go next, and its sample
  const auto hand_out = [&] {
    device::wait(ring.done(leaving.slot), leaving.parity());
    const Tile tile = block.chunk(of_left, left);
#pragma unroll
    for (int tensor = 0; tensor < kMostTensors; ++tensor)
      store(tensors.out[tensor], tile, ring.chunk<unsigned char>(leaving.slot, tensor));
    leaving.next(ring.slots);
    if (++left < portion.chunks) return;
    left = 0;
    ++of_left;
  };
  const auto bytes_of = [](const Tile& tile) { return tile.rows * tile.row * static_cast<int>(sizeof(T)); };
  const auto pass = [&](const Tile& tile, auto cached) {
    if (again.slots == 0) return;
    if (passing.round > 0) device::wait(again.done(passing.slot), (passing.round - 1) & 1);
    device::Barrier* const full = again.full(passing.slot);
    if (device::elected()) device::arrive_expecting(full, bytes_of(tile));
    load(tensors.again, tile, again.template chunk<unsigned char>(passing.slot, 0), full, cached);
    passing.next(again.slots);
  };
  block.steps().for_each(
      [&](int number, int chunk) {
        if (again.slots > 0) pass(block.chunk(number, chunk), device::NoMore());
      },
      [&](int number, int chunk) {
        if (coming.round > 0) {
          hand_out();
          if (device::elected()) {
            device::commit_copies_out();
            device::copies_out_read<0>();
          }
        }
        const Tile tile = block.chunk(number, chunk);
        device::Barrier* const full = ring.full(coming.slot);
        if (device::elected()) device::arrive_expecting(full, block.args.pipeline.tensors * bytes_of(tile));
#pragma unroll
        for (int tensor = 0; tensor < kMostTensors; ++tensor)
          if (tensor < block.args.pipeline.tensors)
            load(tensors.in[tensor], tile, ring.chunk<unsigned char>(coming.slot, tensor), full, device::AsUsual());
        coming.next(ring.slots);
        pass(tile, device::Again(true));
      },
      [](int) {});
  while (of_left < block.samples()) hand_out();
  if (device::elected()) {
    device::commit_copies_out();
    device::copies_out_done<0>();
  }
}

}  // namespace divnorm::cuda
