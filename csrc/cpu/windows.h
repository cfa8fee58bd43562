// Calls with windows, for the types that windows_*.cpp name: what a call needs is made, and its traversal walked.
#pragma once

#include "backward.h"
#include "channels_first.h"
#include "channels_last.h"
#include "forward.h"
#include "partials.h"
#include "window_calls.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kStreamRun = 512;  // contiguous bytes below which outputs do not bypass the cache

template <class A>
struct Constants {
  Buffer<A> zeros{kTilePositions, true}, ones{kTilePositions};
  Constants() {
    for (int64_t i = 0; i < kTilePositions; ++i) ones.data()[i] = 1;
  }
};

inline Reach reach_of(const Field& field, bool mirrored) {
  if (!field.present) return {};
  return mirrored ? Reach{field.hi[0], field.lo[0]} : Reach{field.lo[0], field.hi[0]};
}

// Bytes that one position of a unit takes in `tensors` of x's kind and in `maps` of scratch.
template <class T>
int64_t position_bytes(const Problem& problem, int64_t tensors, int64_t maps) {
  const int64_t groups = problem.channels_last ? problem.groups : 1;
  return groups * (problem.group_channels() * tensors * sizeof(T) + maps * sizeof(Acc<T>));
}

template <class T>
bool streams(const Problem& problem) {
  const bool whole_pixels = problem.groups == 1 && problem.channels % kLanes<Acc<T>> == 0;
  const int64_t pixel = whole_pixels ? problem.numel() : problem.group_channels();
  const int64_t run = problem.channels_last ? pixel : smaller(problem.positions(), kTilePositions);
  return problem.numel() * int64_t{sizeof(T)} >= kStreamBytes && run * int64_t{sizeof(T)} >= kStreamRun;
}

inline Threads threads_for(const Problem& problem, const Traversal& t, int threads) {
  const int64_t useful = larger(1, problem.numel() / kThreadGrain);
  return Threads(static_cast<int>(smaller(threads, useful)), t.jobs(), t.reduce_tiles > 1);
}

template <class T, class Layout>
void forward_in(const Problem& problem, const ForwardTensors& tensors, int threads) {
  using A = Acc<T>;
  const Traversal t = plan_traversal(problem, reach_of(problem.summation, false), reach_of(problem.suppression, false),
                                     position_bytes<T>(problem, 1, kForwardMaps), problem.channels_last);
  Threads team = threads_for(problem, t, threads);
  const Constants<A> constants;
  const Divisors<A> summation(problem, problem.summation), suppression(problem, problem.suppression, true);
  const auto place = [&](int64_t i) { return Layout::parameter_place(problem, i); };
  const Values<A> weight(tensors.weight, problem.affine_size(), 1, place);
  const Values<A> bias(tensors.bias, problem.affine_size(), 0, place);
  const Values<A> sigma(tensors.sigma, problem.groups, 0);
  const Values<A> threshold = thresholds<T>(problem, tensors, place);
  const SmoothRooms<A> smooth(problem, team.count(), Layout::longest_row(problem, t));
  const int64_t l1_count = tensors.l1 == nullptr ? 0 : t.jobs() * t.finish_tiles;
  const Buffer<double> l1(l1_count, true);
  const Buffer<A> team_scratch(team.teams() * kForwardMaps * t.scratch_row_numbers());
  const Boxes<A> boxes(problem, false, team.count());
  const ForwardShared<T> shared{
      {problem, tensors, t, weight.data(), bias.data(), sigma.data(), constants.zeros.data(), constants.ones.data(),
       summation, suppression, tensors.l1 == nullptr ? nullptr : l1.data(), team_scratch.data(), boxes},
      beside<T>(tensors, threshold.data()),
      smooth,
      Layout::kMayStream && streams<T>(problem)};
  walk(problem, t, team,
       [&](int team_index, int thread) { return ForwardPass<T, Layout>(shared, team_index, thread); });
  if (tensors.l1 != nullptr) *tensors.l1 = sum_line(l1.data(), l1_count) / problem.numel();
}

template <class T, class Layout>
void backward_in(const Problem& problem, const BackwardTensors& tensors, int threads) {
  using A = Acc<T>;
  const Traversal t =
      plan_traversal(problem, reach_of(problem.suppression, true), reach_of(problem.summation, true),
                     position_bytes<T>(problem, 2 + problem.residual, kBackwardMaps), problem.channels_last);
  Threads team = threads_for(problem, t, threads);
  const Constants<A> constants;
  const Divisors<A> summation(problem, problem.summation), suppression(problem, problem.suppression);
  const auto place = [&](int64_t i) { return Layout::parameter_place(problem, i); };
  const Values<A> weight(tensors.weight, problem.affine_size(), 1, place);
  const Values<A> bias(tensors.bias, problem.affine_size(), 0, place);
  const Values<A> threshold = thresholds<T>(problem, tensors, place);
  const SmoothRooms<A> smooth(problem, team.count(), Layout::longest_row(problem, t));
  const int64_t rows = t.partial_rows();
  const Buffer<A> dweight(rows * problem.affine_size()), dbias(rows * problem.affine_size());
  const bool learns = learns_thresholds(problem, tensors);
  const Buffer<A> dthreshold(learns ? rows * problem.affine_size() : 0);
  const int64_t sigma_rows = t.blocks * t.reduce_tiles;
  const Buffer<double> sigma_sums(sigma_rows * problem.groups);
  const Buffer<A> team_scratch(team.teams() * kBackwardMaps * t.scratch_row_numbers());
  const Boxes<A> boxes(problem, true, team.count());
  const BackwardShared<T> shared{
      {problem, tensors, t, weight.data(), bias.data(), constants.zeros.data(), constants.ones.data(), summation,
       suppression, quiet<A>(tensors.dl1 / problem.numel()), dweight.data(), dbias.data(),
       learns ? dthreshold.data() : nullptr, sigma_sums.data(), team_scratch.data(), boxes},
      beside<T>(tensors, threshold.data()),
      smooth,
      Layout::kMayStream && streams<T>(problem) && stream_alike(tensors)};
  walk(problem, t, team,
       [&](int team_index, int thread) { return BackwardPass<T, Layout>(shared, team_index, thread); });
  sum_partials(dweight.data(), rows, problem.affine_size(), place, tensors.dweight);
  sum_partials(dbias.data(), rows, problem.affine_size(), place, tensors.dbias);
  sum_partials(dthreshold.data(), rows, problem.affine_size(), place, tensors.dthreshold);
  finish_dsigma(problem, tensors, sigma_sums.data(), sigma_rows);
}

template <class T>
void window_forward(const Problem& problem, const ForwardTensors& tensors, int threads) {
  if (problem.channels_last)
    forward_in<T, ChannelsLast<T>>(problem, tensors, threads);
  else if (problem.affine_per_position)
    forward_in<T, ChannelsFirst<T, true>>(problem, tensors, threads);
  else
    forward_in<T, ChannelsFirst<T, false>>(problem, tensors, threads);
}

template <class T>
void window_backward(const Problem& problem, const BackwardTensors& tensors, int threads) {
  if (problem.channels_last)
    backward_in<T, ChannelsLast<T>>(problem, tensors, threads);
  else if (problem.affine_per_position)
    backward_in<T, ChannelsFirst<T, true>>(problem, tensors, threads);
  else
    backward_in<T, ChannelsFirst<T, false>>(problem, tensors, threads);
}

}  // namespace divnorm::DIVNORM_ISA
