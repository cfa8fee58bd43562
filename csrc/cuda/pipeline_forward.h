// The pipelined kernel's roles forward (pipeline.h).
#pragma once

#include "pipeline_roles.h"
#include "whole.h"

namespace divnorm::cuda {

// Of whole fields: from the moments of the block to the row's, which every block merges in the same order.
template <bool ChannelsLast, Form F, class T, class Team>
__device__ void make_row_forward(const Pipelined<T, ChannelsLast, F>& block, const Exchange<Acc<T>>& exchange,
                                 int number, const Team& team) {
  using A = Acc<T>;
  const Arguments& args = block.args;
  const Shape& shape = args.shape;
  const int positions = block.portion.positions, pitch = args.pipeline.own_pitch, pieces = block.pieces();
  const A* const partial = block.partial(number);
  const auto own = block_moments(
      pieces * positions, block.reduction,
      [&](int i) {
        const int piece = i / positions, p = i - piece * positions;
        return Moments<A>{block.channels_of_piece(piece), partial[piece * pitch + p],
                          partial[(pieces + piece) * pitch + p]};
      },
      team);
  exchange.push_totals(number, team.index(), own.count, own.mean, own.squares);
  exchange.wait(number);
  const auto row = Moments<A>::merged(1, args.resident.blocks, [&](int, int from) {
    return Moments<A>{exchange.total(number, from, 0), exchange.total(number, from, 1),
                      exchange.total(number, from, 2)};
  });
  A numbers[kForwardMaps] = {};
  RowMaps<A> maps{numbers, block.place.rank == 0 && team.index() == 0,
                  SavedMaps<A>(shape, args.tensors, block.sample(number) * shape.groups + block.place.group)};
  if (!maps.saves) maps.saved.variance = nullptr;
  save_statistics<F>(args, maps, block.place.group, row);
  if (shape.summation.present) fill(block.result(number, 0), positions, numbers[forward_map::mean], team);
  if (shape.suppression.present) fill(block.result(number, 1), positions, numbers[forward_map::rstd], team);
}

// From the moments of the block's positions, by pieces of its channels, to mean and rstd of all that it needs.
template <bool ChannelsLast, Form F, class T, class Team>
__device__ void make_windows_forward(const Pipelined<T, ChannelsLast, F>& block, const Exchange<Acc<T>>& exchange,
                                     int number, Acc<T> sigma, const Team& team) {
  using A = Acc<T>;
  const Arguments& args = block.args;
  const Shape& shape = args.shape;
  const Resident& r = args.resident;
  const int n = shape.group_channels, pitch = args.pipeline.own_pitch, pieces = block.pieces();
  const A* const partial = block.partial(number);
  for (int i = team.index(); i < block.portion.positions; i += team.count()) {
    const auto own = Moments<A>::merged(1, pieces, [&](int, int piece) {
      return Moments<A>{block.channels_of_piece(piece), partial[piece * pitch + i],
                        partial[(pieces + piece) * pitch + i]};
    });
    const int p = block.portion.position + i;
    exchange.push(number, forward_map::mean_of_channels, p, own.mean);
    exchange.push(number, forward_map::squares, p,
                  r.channel_blocks == 1 ? own.squares / static_cast<A>(n) : own.squares);
  }
  exchange.wait(number);
  const auto maps = block.maps(number, kForwardStatistics);
  if (r.channel_blocks > 1) {
    for (int p = exchange.begin + team.index(); p < exchange.end; p += team.count()) {
      const auto whole = Moments<A>::merged(1, r.channel_blocks, [&](int, int slice) {
        const int channels = clamped(n - slice * r.tile_channels, 0, r.tile_channels);
        return Moments<A>{static_cast<A>(channels), exchange.load(maps, slice, forward_map::mean_of_channels, p),
                          exchange.load(maps, slice, forward_map::squares, p)};
      });
      maps.store(forward_map::mean_of_channels, p, whole.mean);
      maps.store(forward_map::squares, p, whole.squares / static_cast<A>(n));
    }
    team.sync();
  }
  const ForwardFields<F, A, HaloMaps<A>> fields{shape, maps, sigma};
  run_halo_passes<A>(shape, args.pipeline.everywhere, maps, block.portion, team, fields);
}

template <bool ChannelsLast, Form F, class T>
__device__ void make_maps_forward(const Pipelined<T, ChannelsLast, F>& block) {
  using A = Acc<T>;
  const Arguments& args = block.args;
  if (!args.shape.statistics) return;
  const SomeWarps team = mapping(args.pipeline);
  const Exchange<A> exchange(args, block.place, block.portion, block.signals, block.received, block.totals,
                             kForwardStatistics, kForwardStatistics);
  const A sigma = sigma_of<A>(args.tensors, block.place.group);
  for (int number = 0; number < block.samples(); ++number) {
    if (team.index() == 0) exchange.expect(number);
    device::wait(block.signals.statistics(), number & 1);
    if (args.shape.whole)
      make_row_forward(block, exchange, number, team);
    else
      make_windows_forward(block, exchange, number, sigma, team);
    team.sync();
    if (team.index() == 0) device::arrive(block.signals.maps());
  }
}

// Returns this thread's sum of |v|.
template <bool ChannelsLast, Form F, class T>
__device__ Acc<T> compute_forward(const Pipelined<T, ChannelsLast, F>& block) {
  using A = Acc<T>;
  const Arguments& args = block.args;
  const Shape& shape = args.shape;
  const Portion& portion = block.portion;
  const int pitch = args.pipeline.own_pitch;
  ForwardChunks<T, ChannelsLast, F> chunks(args, portion, computing(args.pipeline));
  A l1 = 0;
  compute_in_order(
      block,
      [&](int number, int i, int slot, int) {
        const Tile chunk = block.chunk(number, i);
        chunks.add_moments(chunk, block.ring.template chunk<T>(slot, 0), shape.summation.present,
                           block.partial(number) + chunk.position - portion.position, pitch);
      },
      [&](int number) { chunks.keep_moments(block.partial(number), pitch); },
      [&](int number, int i, int slot, int) {
        const Tile chunk = block.chunk(number, i);
        const int on = chunk.position - portion.position;
        const Local<A> local{block.result(number, 0) + on,
                             block.result(number, 1) + on,
                             nullptr,
                             nullptr,
                             shape.slope_of,
                             false,
                             F == Form::general && shape.keeps_mean};
        auto affine = block.affine_of(
            chunk, F == Form::general && shape.residual ? block.ring.template chunk<T>(slot, 1) : nullptr);
        with_usual<F>(shape.activation, args.partials.l1 != nullptr, [&](Activation activation, bool rare) {
          affine.activation = activation;
          l1 += chunks.normalize(chunk, block.ring.template chunk<T>(slot, 0), local, affine,
                                 rare && args.partials.l1 != nullptr);
        });
      });
  return l1;
}

}  // namespace divnorm::cuda
