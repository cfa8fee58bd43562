// What the roles of a pipelined block share, forward and backward.
#pragma once

#include "chunk_pixels.h"
#include "chunk_planes.h"
#include "halo_maps.h"

namespace divnorm::cuda {

template <class T, bool ChannelsLast, Form F>
using ForwardChunks = std::conditional_t<ChannelsLast, ForwardPixels<T, F>, ForwardPlanes<T, F>>;
template <class T, bool ChannelsLast, Form F>
using BackwardChunks = std::conditional_t<ChannelsLast, BackwardPixels<T, F>, BackwardPlanes<T, F>>;

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
template <class T, bool ChannelsLast, Form F>
struct Pipelined {
  using A = Acc<T>;

  // By all threads, which meet before any of them goes on.
  __device__ explicit Pipelined(const Arguments& args)
      : args(args),
        place(args),
        portion(args, place),
        ring(args.pipeline.slots, args.pipeline.tensors, args.pipeline.chunk_bytes, args.pipeline.ring,
             surely_in_shared<device::Barrier>(args.pipeline.barriers)),
        again(args.pipeline.again_slots, 1, args.pipeline.chunk_bytes, args.pipeline.again, ring.full(2 * ring.slots)),
        signals(again.full(2 * again.slots)),
        received(surely_in_shared<A>(args.pipeline.maps)),
        results(surely_in_shared<A>(args.pipeline.results)),
        saved(surely_in_shared<A>(args.pipeline.saved)),
        totals(surely_in_shared<A>(args.pipeline.totals)),
        partials(surely_in_shared<A>(args.shared.partial)),
        reduction(surely_in_shared<A>(args.shared.reduction)),
        affine(divnorm::cuda::affine_of<T, F>(args.shape, args.shared, nullptr)) {
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
  __device__ Steps steps() const {
    const int ahead = args.pipeline.ahead;
    return {samples(), portion.chunks, ahead < portion.chunks ? ahead : portion.chunks};
  }
  // Of the sample of this number.
  __device__ A* partial(int number) const { return partials + (number & 1) * args.pipeline.partial_step; }
  // A chunk of it.
  __device__ Tile chunk(int number, int i) const { return portion.template chunk<ChannelsLast>(sample(number), i); }
  // Its maps; statistics: how many it starts from.
  __device__ HaloMaps<A> maps(int number, int statistics) const {
    const Pipeline& p = args.pipeline;
    return {received + (number & 1) * p.received,
            received + 2 * p.received,
            result(number, 0),
            statistics,
            p.pitch,
            first_of_maps(args, place.position_slice),
            p.own_pitch,
            portion.position,
            portion.position + portion.positions,
            place.channel_slice == 0,
            SavedMaps<A>(args.shape, args.tensors, sample(number) * args.shape.groups + place.group)};
  }
  // Of these the first or the second result, which have numbers behind that of the spare map.
  __device__ A* result(int number, int which) const {
    return results + ((number & 1) * kResults + which) * args.pipeline.own_pitch;
  }
  // mean (which: 0) and rstd (1) of the block's own positions as forward has saved them.
  __device__ A* own_saved(int number, int which) const {
    return saved + (number % unsigned{kSavedSamples} * 2 + which) * args.pipeline.own_pitch;
  }
  // The parameters as a chunk sees them.
  __device__ Affine<T> affine_of(const Tile& chunk, T* residual) const {
    constexpr bool kGeneral = F == Form::general;
    const int on = args.shape.per_position ? chunk.position - portion.position : chunk.channel - portion.channel;
    const SharedLayout& at = args.shared;
    const auto gradient = [on](int offset) { return offset < 0 ? nullptr : surely_in_shared<A>(offset) + on; };
    return {surely_in_shared<A>(at.weight) + on,
            surely_in_shared<A>(at.bias) + on,
            kGeneral ? surely_in_shared<A>(at.threshold) + on : nullptr,
            gradient(at.dweight),
            gradient(at.dbias),
            kGeneral ? gradient(at.dthreshold) : nullptr,
            residual,
            args.shape.per_position,
            args.shape.activation};
  }
  // Statistics of the block's positions are left by pieces of its channels, each of so many.
  __device__ int pieces() const { return args.resident.slices.count << args.pipeline.period; }
  __device__ A channels_of_piece(int piece) const {
    const int period = args.pipeline.period;
    if (ChannelsLast) return static_cast<A>(portion.channels);
    return static_cast<A>(slice_channels(portion.channels >> period, piece >> period, args.resident.slices));
  }

  const Arguments& args;
  const Place place;
  const Portion portion;
  const Ring ring, again;  // the second one's slots are none but where dy comes twice
  const Signals signals;
  A *received, *results, *saved, *totals, *partials, *reduction;
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

// The computing warps, step by step. take(number, chunk, slot, again): statistics; publish(number): they are complete,
// and their place is free; finish(number, chunk, slot, again): results. again: the slot of the other ring.
template <class T, bool ChannelsLast, Form F, class Take, class Publish, class Finish>
__device__ void compute_in_order(const Pipelined<T, ChannelsLast, F>& block, Take&& take, Publish&& publish,
                                 Finish&& finish) {
  const Ring &ring = block.ring, &again = block.again;
  const bool with_maps = block.args.shape.statistics;
  Turn coming, leaving, passing;
  const auto pass = [&](auto&& step) {
    const bool twice = again.slots > 0;
    if (twice) device::wait(again.full(passing.slot), passing.parity());
    step();
    if (!twice) return;
    arrive_as_warp(again.done(passing.slot));
    passing.next(again.slots);
  };
  block.steps().for_each(
      [&](int number, int chunk) {
        if (chunk == 0 && with_maps) device::wait(block.signals.maps(), number & 1);
        pass([&] { finish(number, chunk, leaving.slot, passing.slot); });
        device::fence_async();
        arrive_as_warp(ring.done(leaving.slot));
        leaving.next(ring.slots);
      },
      [&](int number, int chunk) {
        device::wait(ring.full(coming.slot), coming.parity());
        pass([&] {
          if (with_maps) take(number, chunk, coming.slot, passing.slot);
        });
        coming.next(ring.slots);
      },
      [&](int number) {
        if (!with_maps) return;
        publish(number);
        arrive_as_warp(block.signals.statistics());
      });
}

}  // namespace divnorm::cuda
