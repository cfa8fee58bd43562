// The pipelined kernel's roles backward (pipeline.h).
#pragma once

#include "pipeline_roles.h"
#include "whole.h"

namespace divnorm::cuda {

// Where the backward maps of a position start: from forward's rstd, into the exchange.
template <class A>
struct PushedStart {
  const Exchange<A>& exchange;
  int number;
  A rstd;

  __device__ A load(int, int) const { return rstd; }
  __device__ void store(int map, int p, A value) const { exchange.push(number, map, p, value); }
};

// The sums of the block's channels over one of its positions.
template <class T, bool ChannelsLast, Form F>
__device__ ChannelSums<Acc<T>, 1> sums_of_position(const Pipelined<T, ChannelsLast, F>& block, int number, int i) {
  const int pieces = block.pieces(), pitch = block.args.pipeline.own_pitch;
  const Acc<T>* const partial = block.partial(number) + i;
  ChannelSums<Acc<T>, 1> sums;
  for (int piece = 0; piece < pieces; ++piece) {
    sums.scale[0] += partial[piece * pitch];
    sums.shift[0] += partial[(pieces + piece) * pitch];
    sums.centred[0] += partial[(2 * pieces + piece) * pitch];
  }
  return sums;
}

// Of whole fields: from the sums of the block to the row's slopes, which every block makes in the same way. Returns
// what the row adds to dsigma.
template <bool ChannelsLast, Form F, class T, class Team>
__device__ Acc<T> make_row_backward(const Pipelined<T, ChannelsLast, F>& block, const Exchange<Acc<T>>& exchange,
                                    int number, const Team& team) {
  using A = Acc<T>;
  const Arguments& args = block.args;
  const Shape& shape = args.shape;
  const int positions = block.portion.positions;
  A scale = 0, shift = 0, centred = 0;
  for (int i = team.index(); i < positions; i += team.count()) {
    const auto sums = sums_of_position(block, number, i);
    scale += sums.scale[0];
    shift += sums.shift[0];
    centred += sums.centred[0];
  }
  scale = shared_sum(scale, block.reduction, team);
  shift = shared_sum(shift, block.reduction, team);
  centred = absolute<F>(shape) ? shared_sum(centred, block.reduction, team) : A(0);
  exchange.push_totals(number, team.index(), scale, shift, centred);
  exchange.wait(number);
  scale = shift = centred = 0;
  for (int from = 0; from < args.resident.blocks; ++from) {
    scale += exchange.total(number, from, 0);
    shift += exchange.total(number, from, 1);
    centred += exchange.total(number, from, 2);
  }
  A numbers[kBackwardMaps] = {};
  numbers[backward_map::rstd] = block.own_saved(number, 1)[0];
  const RowMaps<A> maps{numbers, false,
                        SavedMaps<A>(shape, args.tensors, block.sample(number) * shape.groups + block.place.group)};
  const A dsigma = save_slopes<F>(args, maps, block.place.group, scale, shift, centred);
  if (shape.suppression.present) fill(block.result(number, 0), positions, numbers[backward_map::slope], team);
  if (shape.summation.present) fill(block.result(number, 1), positions, numbers[backward_map::offset], team);
  return block.place.rank == 0 && team.index() == 0 ? dsigma : A(0);
}

// From the sums of the block's positions, by pieces of its channels, to slope and offset of these. They start where the
// sums are, which goes with them linearly, so that rstd is of use to its own positions alone. Returns what this
// thread's positions add to dsigma.
template <bool ChannelsLast, Form F, class T, class Team>
__device__ Acc<T> make_windows_backward(const Pipelined<T, ChannelsLast, F>& block, const Exchange<Acc<T>>& exchange,
                                        int number, const Team& team) {
  using A = Acc<T>;
  const Arguments& args = block.args;
  const Shape& shape = args.shape;
  const Resident& r = args.resident;
  A dsigma = 0;
  for (int i = team.index(); i < block.portion.positions; i += team.count()) {
    const auto sums = sums_of_position(block, number, i);
    const PushedStart<A> start{exchange, number, block.own_saved(number, 1)[i]};
    dsigma +=
        start_backward<F>(shape, start, block.portion.position + i, sums.scale[0], sums.shift[0], sums.centred[0]);
  }
  exchange.wait(number);
  const auto maps = block.maps(number, kBackwardStatistics);
  if (r.channel_blocks > 1) {
    for (int map = shape.suppression.present ? backward_map::scale : backward_map::shift;
         map <= backward_map::centred_sum; ++map)
      for (int p = exchange.begin + team.index(); p < exchange.end; p += team.count()) {
        A sum = 0;
        for (int slice = 0; slice < r.channel_blocks; ++slice) sum += exchange.load(maps, slice, map, p);
        maps.store(map, p, sum);
      }
    team.sync();
  }
  const BackwardFields<A, HaloMaps<A>> fields{shape, maps, A(1) / static_cast<A>(shape.group_channels)};
  run_halo_passes<A>(shape, args.pipeline.everywhere, maps, block.portion, team, fields);
  return dsigma;
}

// Returns this thread's part of dsigma.
template <bool ChannelsLast, Form F, class T>
__device__ Acc<T> make_maps_backward(const Pipelined<T, ChannelsLast, F>& block) {
  using A = Acc<T>;
  const Arguments& args = block.args;
  const Shape& shape = args.shape;
  if (!shape.statistics) return A(0);
  const SomeWarps team = mapping(args.pipeline);
  const int statistics = shape.suppression.present ? kBackwardStatistics : kBackwardStatistics - 1;
  const Exchange<A> exchange(args, block.place, block.portion, block.signals, block.received, block.totals,
                             kBackwardStatistics, statistics);
  // What forward has saved of the next sample, while nothing is known of this one: the computing warps have done with
  // the sample kSavedSamples before it when they have published the one before this.
  const auto read_saved = [&](int number) {
    if (number >= block.samples()) return;
    const SavedMaps<A> from(shape, args.tensors, block.sample(number) * shape.groups + block.place.group);
    const auto read = [&](bool present, const A* map, A* to) {
      if (!present) return;
      if (shape.whole) return fill(to, block.portion.positions, device::load(map), team);
      for (int i = team.index(); i < block.portion.positions; i += team.count())
        to[i] = device::load(map + block.portion.position + i);
    };
    read(shape.summation.present, from.mean, block.own_saved(number, 0));
    read(shape.suppression.present, from.rstd, block.own_saved(number, 1));
    team.sync();
    if (team.index() == 0) device::arrive(block.signals.saved(number));
  };
  A dsigma = 0;
  read_saved(0);
  for (int number = 0; number < block.samples(); ++number) {
    read_saved(number + 1);
    if (team.index() == 0) exchange.expect(number);
    device::wait(block.signals.statistics(), number & 1);
    dsigma += shape.whole ? make_row_backward(block, exchange, number, team)
                          : make_windows_backward(block, exchange, number, team);
    team.sync();
    if (team.index() == 0) device::arrive(block.signals.maps());
  }
  return dsigma;
}

template <bool ChannelsLast, Form F, class T, class Chunks>
__device__ void compute_backward(const Pipelined<T, ChannelsLast, F>& block, Chunks& chunks) {
  using A = Acc<T>;
  const Arguments& args = block.args;
  const Shape& shape = args.shape;
  const Portion& portion = block.portion;
  const int pitch = args.pipeline.own_pitch;
  const A l1 = l1_gradient<A>(args.tensors);
  const bool twice = args.pipeline.again_slots > 0;
  const auto local_of = [&](int number, int on) {
    return Local<A>{block.own_saved(number, 0) + on,
                    block.own_saved(number, 1) + on,
                    block.result(number, 0) + on,
                    block.result(number, 1) + on,
                    shape.slope_of,
                    absolute<F>(shape),
                    F == Form::general && shape.keeps_mean};
  };
  const auto affine_of = [&](const Tile& chunk, int slot) {
    return block.affine_of(
        chunk, F == Form::general && shape.residual ? block.ring.template chunk<T>(slot, twice ? 1 : 2) : nullptr);
  };
  const auto dy_of = [&](int slot, int again) {
    return twice ? block.again.template chunk<T>(again, 0) : block.ring.template chunk<T>(slot, 1);
  };
  const bool rare = l1 != A(0) || shape.slope_of != SlopeOf::values;
  compute_in_order(
      block,
      [&](int number, int i, int slot, int again) {
        if (i == 0) device::wait(block.signals.saved(number), number >> 1 & 1);
        const Tile chunk = block.chunk(number, i);
        const int on = chunk.position - portion.position;
        const auto local = local_of(number, on);
        auto affine = affine_of(chunk, slot);
        with_usual<F>(shape.activation, rare, [&](Activation activation, bool rare) {
          affine.activation = activation;
          chunks.add_sums(chunk, block.ring.template chunk<T>(slot, 0), dy_of(slot, again), local, affine,
                          rare ? l1 : A(0), block.partial(number) + on, pitch);
        });
      },
      [&](int number) { chunks.keep_sums(block.partial(number), pitch); },
      [&](int number, int i, int slot, int again) {
        const Tile chunk = block.chunk(number, i);
        auto local = local_of(number, chunk.position - portion.position);
        auto affine = affine_of(chunk, slot);
        with_usual<F>(shape.activation, rare, [&](Activation activation, bool rare) {
          affine.activation = activation;
          local.slope_of = rare ? shape.slope_of : SlopeOf::values;
          chunks.differentiate(chunk, block.ring.template chunk<T>(slot, 0), dy_of(slot, again), local, affine,
                               rare ? l1 : A(0));
        });
      });
}

}  // namespace divnorm::cuda
