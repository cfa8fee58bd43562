// Rows that fit the shared memory of a cluster, and pass through it chunk by chunk: one read of x (and dy), one write
// of the result, and none of them waits for another. A sample's life in a block, beside the next one's:
//
//   the warp that copies      c0 c1 c2 c3   C0 C1 C2 C3 ...             in, as slots of the ring are free
//   the warps that compute       s0 s1 s2 s3   S0 r0 S1 r1 S2 r2 S3 r3   s: a chunk's statistics, r: results in place
//   the warps for the maps                  push.wait.passes             and once more for S
//   the warp that copies                             o0    o1    o2      out, which hands the slot on
//
// The statistics (mean and sum of squares, or backward's sums) of a block's positions go to the blocks that hold other
// channels of them or whose windows reach them, once a sample, by stores that the receiver counts: no barrier of the
// cluster stands between the first sample and the last. Chunks C of the next sample come into the slots that the ring
// has beyond a sample's, and into those that results leave. Where x and dy do not both fit, x stays and dy comes twice,
// with s and with r, through a ring of its own; the second time from the cache.
#pragma once

#include "finish_inside.h"
#include "gradients.h"
#include "pipeline_backward.h"
#include "pipeline_forward.h"
#include "producer.h"

namespace divnorm::cuda {

// What a result of an absent field holds of every position.
template <class T, bool ChannelsLast, Form F>
__device__ void fill_absent(const Pipelined<T, ChannelsLast, F>& block, int of_summation, int of_suppression,
                            Acc<T> neutral) {
  const Shape& shape = block.args.shape;
  for (int number = 0; number < 2; ++number) {
    if (!shape.summation.present) fill(block.result(number, of_summation), block.portion.positions, Acc<T>(0));
    if (!shape.suppression.present) fill(block.result(number, of_suppression), block.portion.positions, neutral);
  }
}

template <class T, bool ChannelsLast, Form F>
__global__ void __launch_bounds__(kPipelinedThreads, 1) pipelined_forward(const __grid_constant__ Arguments args) {
  device::let_next_begin();
  clear_counters(args.partials);
  const Pipelined<T, ChannelsLast, F> block(args);
  fill_absent(block, 0, 1, Acc<T>(1));
  device::sync_cluster(args.resident.blocks);
  constexpr int none = boxed::count;
  Acc<T> l1 = 0;
  switch (role_of(args.pipeline)) {
    case Role::compute: l1 = compute_forward(block); break;
    case Role::maps: make_maps_forward(block); break;
    case Role::copy: copy_chunks(block, {{boxed::x, boxed::residual, none}, {boxed::out, none, none}, none});
  }
  store_sum(args.partials.l1, block.place.slot(args.resident), l1, block.reduction);
  finish_inside<Acc<T>>(args.inside, block.ring.template chunk<unsigned char>(0, 0));
}

template <class T, bool ChannelsLast, Form F>
__global__ void __launch_bounds__(kPipelinedThreads, 1) pipelined_backward(const __grid_constant__ Arguments args) {
  using A = Acc<T>;
  const Shape& shape = args.shape;
  const Resident& r = args.resident;
  device::let_next_begin();
  clear_counters(args.partials);
  const Pipelined<T, ChannelsLast, F> block(args);
  const SomeWarps team = computing(args.pipeline);
  BackwardChunks<T, ChannelsLast, F> chunks(args, block.portion, team);
  const int sharers = shape.per_position ? 1 : chunks.sharers();
  clear_gradients(block.affine, shape.per_position ? block.portion.positions : block.portion.channels * sharers);
  fill_absent(block, 1, 0, A(0));
  for (int number = 0; number < kSavedSamples; ++number) {
    if (!shape.summation.present) fill(block.own_saved(number, 0), block.portion.positions, A(0));
    if (!shape.suppression.present) fill(block.own_saved(number, 1), block.portion.positions, A(1));
  }
  device::sync_cluster(r.blocks);
  constexpr int none = boxed::count;
  A dsigma = 0;
  const Role role = role_of(args.pipeline);
  switch (role) {
    case Role::compute: compute_backward(block, chunks); break;
    case Role::maps: dsigma = make_maps_backward(block); break;
    case Role::copy:
      if (args.pipeline.again_slots > 0)
        copy_chunks(block, {{boxed::x, boxed::residual, none}, {boxed::out, boxed::dresidual, none}, boxed::dy});
      else
        copy_chunks(block, {{boxed::x, boxed::dy, boxed::residual}, {boxed::out, none, boxed::dresidual}, none});
  }
  device::sync_block();  // the ring is free
  if (role == Role::compute) chunks.collect(block.affine, block.ring.template chunk<A>(0, 0), team);
  Tile own = block.chunk(0, 0);
  own.channels = block.portion.channels;
  own.positions = block.portion.positions;
  const Place& place = block.place;
  if (r.merges_gradients) {
    merge_gradients(shape, args.partials, r, place.part, place.group, place.rank, own, sharers, block.affine);
  } else {
    const int64_t slot =
        shape.per_position ? place.part : static_cast<int64_t>(place.part) * r.position_blocks + place.position_slice;
    store_gradients(shape, args.partials, slot, place.group, own, sharers, block.affine);
  }
  store_sum(args.partials.dsigma, place.slot(r), signed_dsigma<F>(args, place.group, dsigma), block.reduction);
  finish_inside<A>(args.inside, block.ring.template chunk<unsigned char>(0, 0));
}

}  // namespace divnorm::cuda
