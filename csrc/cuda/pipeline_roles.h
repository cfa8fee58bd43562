// What the roles of a pipelined block portion, forward and backward.
#pragma once

#include "chunk_pixels.h"
#include "chunk_planes.h"
#include "halo_maps.h"

namespace divnorm::cuda {

template <class T, bool ChannelsLast, Form F>
using Chunks = std::conditional_t<ChannelsLast, PixelChunks<T, F>, PlaneChunks<T, F>>;

// Named barriers.
enum { kComputeBarrier = 1, kMapBarrier = 2 };

enum class Role { compute, maps, copy };

__device__ inline Role role_of(const Pipeline& p) {
  const int thread = device::thread();
  return thread < p.compute_threads                 ? Role::compute
         : thread < p.compute_threads + kMapThreads ? Role::maps
                                                    : Role::copy;
}
__device__ inline SomeWarps computing(const Pipeline& p) { return {0, p.compute_threads, kComputeBarrier}; }
__device__ inline SomeWarps mapping(const Pipeline& p) { return {p.compute_threads, kMapThreads, kMapBarrier}; }

// A pipelined block as its roles see it.
template <class T, Form F>
struct Pipelined {
  using A = Acc<T>;

  // By all threads, which meet before any of them goes on.
  __device__ explicit Pipelined(const Arguments& args)
      : args(args),
        place(args),
        portion(args, place),
        ring(args.pipeline.slots, args.pipeline.tensors, args.pipeline.chunk_bytes, args.pipeline.ring,
             in_shared<device::Barrier>(args.pipeline.barriers)),
        again(args.pipeline.again_slots, 1, args.pipeline.chunk_bytes, args.pipeline.again, ring.full(2 * ring.slots)),
        signals(again.full(2 * again.slots)),
        maps(in_shared<A>(args.pipeline.maps)),
        saved(in_shared<A>(args.pipeline.saved)),
        totals(in_shared<A>(args.pipeline.totals)),
        partials(in_shared<A>(args.shared.partial)),
        reduction(in_shared<A>(args.shared.reduction)),
        affine(affine_of<T, F>(args.shape, args.shared, nullptr)) {
    if (device::thread() == 0) {
      const int warps = args.pipeline.compute_threads / device::kWarp;
      ring.start(warps);
      again.start(warps);
      signals.start(warps, args.pipeline.saved >= 0);
      device::inits_done();
    }
    load_affine(args.shape, args.tensors, place.group, portion.channel, portion.channels, portion.position,
                portion.positions, affine);
  }

  // How many samples the block works on, and which one has this number.
  __device__ int samples() const {
    return static_cast<int>((args.shape.batch - place.part - 1) / args.resident.parts) + 1;
  }
  __device__ int64_t sample(int number) const { return place.part + int64_t{number} * args.resident.parts; }
  __device__ Steps steps() const { return {samples(), portion.chunks, args.pipeline.ahead}; }
  // Of the sample of this number.
  __device__ A* partial(int number) const { return partials + number % 2 * args.pipeline.partial_step; }
  // A map at the block's own positions.
  __device__ A* own(int number, int map) const {
    const Pipeline& p = args.pipeline;
    return maps + number % 2 * p.sample_maps + map * p.pitch + portion.position -
           first_of_maps(args, place.position_slice);
  }
  // mean (which: 0) and rstd (1) of the block's own positions as forward has saved them.
  __device__ A* own_saved(int number, int which) const {
    return saved + (number % kSavedSamples * 2 + which) * args.pipeline.own_pitch;
  }
  // The parameters as a chunk sees them.
  __device__ Affine<T> affine_of_chunk(const Tile& chunk, T* residual) const {
    const int on = args.shape.per_position ? chunk.position - portion.position : chunk.channel - portion.channel;
    const auto from = [on](A* numbers) { return numbers == nullptr ? nullptr : numbers + on; };
    return {
        from(affine.weight),     from(affine.bias), from(affine.threshold), from(affine.dweight), from(affine.dbias),
        from(affine.dthreshold), residual,          affine.per_position,    affine.activation};
  }
  // Of the block's channels.
  __device__ A count_of_slice(int slice) const {
    if (args.shape.channels_last) return static_cast<A>(portion.channels);
    const Slices& slices = args.resident.slices;
    const int before = portion.chunks - 1, each = args.pipeline.chunk_channels;  // chunks before the last
    return static_cast<A>(before * slice_channels(each, slice, slices) +
                          slice_channels(portion.channels - before * each, slice, slices));
  }

  const Arguments& args;
  const Place place;
  const Portion portion;
  const Ring ring, again;  // the second one's slots are none but where dy comes twice
  const Signals signals;
  A *maps, *saved, *totals, *partials, *reduction;
  Affine<T> affine;
};

// Calls body(activation, rare): what most calls have of the plain form as constants, so that what others ask for is not
// in their way. rare: whether anything beside it is asked for, which it is then told.
template <Form F, class Body>
__device__ void with_usual(Activation activation, bool rare, Body&& body) {
  if (F == Form::general || rare)
    body(activation, true);
  else if (activation == Activation::none)
    body(Activation::none, false);
  else
    body(Activation::relu, false);
}

// The computing warps, step by step. take(number, chunk, slot, again): statistics; publish(number): they are complete;
// finish(number, chunk, slot, again): results. again: the slot of the other ring.
template <class T, Form F, class Take, class Publish, class Finish>
__device__ void compute_in_order(const Pipelined<T, F>& block, Take&& take, Publish&& publish, Finish&& finish) {
  const Ring &ring = block.ring, &again = block.again;
  const bool with_maps = block.args.shape.statistics;
  Turn coming, leaving, passing;
  bool published = !with_maps;
  for (Steps steps = block.steps(); steps.next();) {
    if (again.slots > 0) device::wait(again.full(passing.slot), passing.parity());
    if (steps.takes) {
      device::wait(ring.full(coming.slot), coming.parity());
      if (with_maps) take(steps.number, steps.chunk, coming.slot, passing.slot);
      coming.next(ring.slots);
    } else {
      if (steps.chunk == 0 && with_maps) device::wait(block.signals.maps(), steps.number % 2);
      finish(steps.number, steps.chunk, leaving.slot, passing.slot);
      device::fence_async();
      arrive_as_warp(ring.done(leaving.slot));
      leaving.next(ring.slots);
    }
    if (again.slots > 0) {
      arrive_as_warp(again.done(passing.slot));
      passing.next(again.slots);
    }
    if (!with_maps) continue;
    if (!steps.complete()) {
      published = false;
    } else if (!published) {
      publish(steps.next_sample());  // whose place is free now that the maps of the sample before are made
      arrive_as_warp(block.signals.statistics());
      published = true;
    }
  }
}

}  // namespace divnorm::cuda
