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
        ring(args.pipeline),
        maps(in_shared<A>(args.pipeline.maps)),
        saved(in_shared<A>(args.pipeline.saved)),
        totals(in_shared<A>(args.pipeline.totals)),
        partials(in_shared<A>(args.shared.partial)),
        reduction(in_shared<A>(args.shared.reduction)),
        affine(affine_of<T, F>(args.shape, args.shared, nullptr)) {
    if (device::thread() == 0) ring.start(args.pipeline);
    load_affine(args.shape, args.tensors, place.group, portion.channel, portion.channels, portion.position,
                portion.positions, affine);
  }

  // How many samples the block works on, and which one has this number.
  __device__ int samples() const {
    return static_cast<int>((args.shape.batch - place.part - 1) / args.resident.parts) + 1;
  }
  __device__ int64_t sample(int number) const { return place.part + int64_t{number} * args.resident.parts; }
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
  __device__ A count_of_slice(int slice) const {  // of the block's channels
    if (args.shape.channels_last) return static_cast<A>(portion.channels);
    int count = 0;
    for (int first = 0; first < portion.channels; first += args.pipeline.chunk_channels)
      count += slice_channels(clamped(portion.channels - first, 0, args.pipeline.chunk_channels), slice,
                              args.resident.slices);
    return static_cast<A>(count);
  }

  const Arguments& args;
  const Place place;
  const Portion portion;
  const Ring ring;
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

// The order of the warps that compute. take(number, chunk, slot): statistics; publish(number): they are complete;
// finish(number, chunk, slot): results. Before the results of a sample, while its maps are made, the statistics of as
// many chunks of the next one as the ring has room for; then those of another one for each chunk of results. What a
// chunk waits for is always behind something before it in this order: its slot's last results, or maps, which wait for
// statistics that every block of the cluster has taken before the results in its way.
template <class T, Form F, class Take, class Publish, class Finish>
__device__ void compute_in_order(const Pipelined<T, F>& block, Take&& take, Publish&& publish, Finish&& finish) {
  const Ring& ring = block.ring;
  const bool with_maps = block.args.shape.statistics;
  const int chunks = block.portion.chunks, samples = block.samples();
  Turn coming, leaving;
  for (int number = -1; number < samples; ++number) {  // at first there is nothing to finish
    const int takes = number + 1 < samples ? chunks : 0, finishes = number < 0 ? 0 : chunks;
    const int ahead = number < 0 ? chunks : ring.slots - chunks;
    int taken = 0, finished = 0;
    bool published = takes == 0 || !with_maps;
    while (taken < takes || finished < finishes) {
      if (taken < takes && taken < ahead + finished) {
        device::wait(ring.full(coming.slot), coming.parity());
        if (with_maps) take(number + 1, taken, coming.slot);
        coming.next(ring.slots);
        ++taken;
      } else {
        if (finished == 0 && with_maps) device::wait(ring.maps(), number % 2);
        finish(number, finished, leaving.slot);
        device::fence_async();
        arrive_as_warp(ring.done(leaving.slot));
        leaving.next(ring.slots);
        ++finished;
      }
      if (published || taken < takes || (finished == 0 && finishes > 0)) continue;
      publish(number + 1);  // whose place is free now that the maps of the sample before are made
      arrive_as_warp(ring.statistics());
      published = true;
    }
  }
}

}  // namespace divnorm::cuda
