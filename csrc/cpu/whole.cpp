// Compiled once per instruction set, as kernels.cpp.
#include "partials.h"
#include "whole_calls.h"
#include "whole_columns_backward.h"
#include "whole_columns_forward.h"
#include "whole_runs_backward.h"
#include "whole_runs_forward.h"

namespace divnorm::DIVNORM_ISA {

namespace {

// One position a channel, and the (N, F) form: parameters run along the row.
bool along_row(const Problem& p) { return !p.over_batch && p.numel() == p.batch * p.affine_size(); }
bool in_columns(const Problem& p) { return !along_row(p) && (p.channels_last || p.affine_per_position); }

Threads threads_for(const Problem& p, const WholeJobs& jobs, int64_t parts_of_unit, int threads) {
  const int64_t useful = larger(1, p.numel() / kThreadGrain);
  return Threads(static_cast<int>(smaller(threads, useful)), jobs.count(), parts_of_unit > 1);
}

// As many that two teams' never share a cache line.
int64_t apart(int64_t count) { return divide_up(count, 64) * 64; }

template <class T>
bool streams(const Problem& p) {
  return kStreams<T> && p.numel() * int64_t{sizeof(T)} >= kStreamBytes;
}

template <class T, bool AlongRow>
void forward_runs(const Problem& p, const ForwardTensors& tensors, int threads) {
  using Pass = ForwardRuns<T, AlongRow>;
  using A = typename Pass::A;
  const typename Pass::Layout layout(p);
  const WholeJobs jobs(p, false, AlongRow);
  const Unit unit{0, jobs.unit_samples, 0, 1};
  const int64_t chunks = apart(layout.chunks(unit)), pieces = layout.pieces(unit);
  Threads team = threads_for(p, jobs, larger(layout.chunks(unit), pieces), threads);
  const auto place = [&](int64_t i) { return Pass::Layout::parameter_place(p, i); };
  const Values<A> weight(tensors.weight, p.affine_size(), 1, place), bias(tensors.bias, p.affine_size(), 0, place);
  const Values<double> sigma(tensors.sigma, p.groups, 0);
  const Values<A> threshold = thresholds<T>(p, tensors, place);
  const SmoothRooms<A> smooth(p, team.count(), kSmoothRun);
  const Buffer<Moments> moments(team.teams() * chunks);
  const int64_t l1_count = tensors.l1 == nullptr ? 0 : p.map_rows() * pieces;
  const Buffer<double> l1(l1_count);
  const typename Pass::Shared shared{p,
                                     tensors,
                                     layout,
                                     weight.data(),
                                     bias.data(),
                                     beside<T>(tensors, threshold.data()),
                                     smooth,
                                     sigma.data(),
                                     streams<T>(p),
                                     moments.data(),
                                     tensors.l1 == nullptr ? nullptr : l1.data(),
                                     chunks,
                                     pieces};
  walk_whole(p, jobs, team, [&](const Member& member) { return Pass(shared, member); });
  if (tensors.l1 != nullptr) *tensors.l1 = sum_line(l1.data(), l1_count) / p.numel();
}

template <class T>
void forward_columns(const Problem& p, const ForwardTensors& tensors, int threads) {
  using Pass = ForwardColumns<T>;
  using A = typename Pass::A;
  const typename Pass::Layout layout(p);
  const WholeJobs jobs(p, true, false);
  Threads team = threads_for(p, jobs, layout.tiles(), threads);
  const auto place = [&](int64_t i) { return Pass::Layout::parameter_place(p, i); };
  const Values<A> weight(tensors.weight, p.affine_size(), 1, place), bias(tensors.bias, p.affine_size(), 0, place);
  const Values<double> sigma(tensors.sigma, p.groups, 0);
  const Values<A> threshold = thresholds<T>(p, tensors, place);
  const SmoothRooms<A> smooth(p, team.count(), layout.channels());
  const Buffer<A> scratch(team.teams() * (2 * layout.tiles() + 3) * layout.channels()),
      thread_scratch(team.count() * layout.channels());
  const int64_t l1_count = tensors.l1 == nullptr ? 0 : p.map_batch() * layout.tiles();
  const Buffer<double> l1(l1_count);
  const typename Pass::Shared shared{p,
                                     tensors,
                                     layout,
                                     weight.data(),
                                     bias.data(),
                                     beside<T>(tensors, threshold.data()),
                                     smooth,
                                     sigma.data(),
                                     streams<T>(p),
                                     scratch.data(),
                                     thread_scratch.data(),
                                     tensors.l1 == nullptr ? nullptr : l1.data()};
  walk_whole(p, jobs, team, [&](const Member& member) { return Pass(shared, member); });
  if (tensors.l1 != nullptr) *tensors.l1 = sum_line(l1.data(), l1_count) / p.numel();
}

// The partial sums of a backward and, after it, what becomes of them.
template <class T>
class Partials {
 public:
  using A = Acc<T>;

  Partials(const Problem& p, const BackwardTensors& tensors, int64_t blocks)
      : problem_(p),
        learns_(learns_thresholds(p, tensors)),
        blocks_(blocks),
        dweight_(blocks * p.affine_size()),
        dbias_(blocks * p.affine_size()),
        dthreshold_(learns_ ? blocks * p.affine_size() : 0),
        for_sigma_(p.map_rows()) {}

  A* dweight() const { return dweight_.data(); }
  A* dbias() const { return dbias_.data(); }
  A* dthreshold() const { return learns_ ? dthreshold_.data() : nullptr; }
  double* for_sigma() const { return for_sigma_.data(); }

  template <class Place>
  void finish(const BackwardTensors& tensors, Place&& place) const {
    sum_partials(dweight(), blocks_, problem_.affine_size(), place, tensors.dweight);
    sum_partials(dbias(), blocks_, problem_.affine_size(), place, tensors.dbias);
    sum_partials(dthreshold(), blocks_, problem_.affine_size(), place, tensors.dthreshold);
    finish_dsigma(problem_, tensors, for_sigma(), problem_.map_batch());
  }

 private:
  const Problem& problem_;
  bool learns_;
  int64_t blocks_;
  Buffer<A> dweight_, dbias_, dthreshold_;
  Buffer<double> for_sigma_;
};

template <class T, bool AlongRow>
void backward_runs(const Problem& p, const BackwardTensors& tensors, int threads) {
  using Pass = BackwardRuns<T, AlongRow>;
  using A = typename Pass::A;
  const typename Pass::Layout layout(p);
  const WholeJobs jobs(p, false, AlongRow);
  const Unit unit{0, jobs.unit_samples, 0, 1};
  const int64_t pieces = apart(layout.pieces(unit));
  Threads team = threads_for(p, jobs, layout.pieces(unit), threads);
  const auto place = [&](int64_t i) { return Pass::Layout::parameter_place(p, i); };
  const Values<A> weight(tensors.weight, p.affine_size(), 1, place), bias(tensors.bias, p.affine_size(), 0, place);
  const Values<A> threshold = thresholds<T>(p, tensors, place);
  const SmoothRooms<A> smooth(p, team.count(), layout.longest_part(), layout.parts(unit));
  const Partials<T> partials(p, tensors, jobs.blocks);
  const Buffer<GradientSums> sums(team.teams() * pieces);
  const typename Pass::Shared shared{p,
                                     tensors,
                                     layout,
                                     weight.data(),
                                     bias.data(),
                                     beside<T>(tensors, threshold.data()),
                                     smooth,
                                     streams<T>(p) && stream_alike(tensors),
                                     quiet<A>(tensors.dl1 / p.numel()),
                                     partials.dweight(),
                                     partials.dbias(),
                                     partials.dthreshold(),
                                     partials.for_sigma(),
                                     sums.data(),
                                     pieces};
  walk_whole(p, jobs, team, [&](const Member& member) { return Pass(shared, member); });
  partials.finish(tensors, place);
}

template <class T>
void backward_columns(const Problem& p, const BackwardTensors& tensors, int threads) {
  using Pass = BackwardColumns<T>;
  using A = typename Pass::A;
  const typename Pass::Layout layout(p);
  const WholeJobs jobs(p, true, false);
  Threads team = threads_for(p, jobs, layout.tiles(), threads);
  const auto place = [&](int64_t i) { return Pass::Layout::parameter_place(p, i); };
  const Values<A> weight(tensors.weight, p.affine_size(), 1, place), bias(tensors.bias, p.affine_size(), 0, place);
  const Values<A> threshold = thresholds<T>(p, tensors, place);
  const SmoothRooms<A> smooth(p, team.count(), layout.channels(), layout.pixels());
  const Partials<T> partials(p, tensors, jobs.blocks);
  const Buffer<A> scratch(team.teams() * (4 * layout.tiles() + 6) * layout.channels());
  const typename Pass::Shared shared{p,
                                     tensors,
                                     layout,
                                     weight.data(),
                                     bias.data(),
                                     beside<T>(tensors, threshold.data()),
                                     smooth,
                                     streams<T>(p) && stream_alike(tensors),
                                     quiet<A>(tensors.dl1 / p.numel()),
                                     partials.dweight(),
                                     partials.dbias(),
                                     partials.dthreshold(),
                                     partials.for_sigma(),
                                     scratch.data()};
  walk_whole(p, jobs, team, [&](const Member& member) { return Pass(shared, member); });
  partials.finish(tensors, place);
}

}  // namespace

template <class T>
void whole_forward(const Problem& p, const ForwardTensors& tensors, int threads) {
  if (along_row(p))
    forward_runs<T, true>(p, tensors, threads);
  else if (in_columns(p))
    forward_columns<T>(p, tensors, threads);
  else
    forward_runs<T, false>(p, tensors, threads);
}

template <class T>
void whole_backward(const Problem& p, const BackwardTensors& tensors, int threads) {
  if (along_row(p))
    backward_runs<T, true>(p, tensors, threads);
  else if (in_columns(p))
    backward_columns<T>(p, tensors, threads);
  else
    backward_runs<T, false>(p, tensors, threads);
}

template void whole_forward<double>(const Problem&, const ForwardTensors&, int);
template void whole_forward<float>(const Problem&, const ForwardTensors&, int);
template void whole_forward<BFloat16>(const Problem&, const ForwardTensors&, int);
template void whole_forward<Float16>(const Problem&, const ForwardTensors&, int);
template void whole_backward<double>(const Problem&, const BackwardTensors&, int);
template void whole_backward<float>(const Problem&, const BackwardTensors&, int);
template void whole_backward<BFloat16>(const Problem&, const BackwardTensors&, int);
template void whole_backward<Float16>(const Problem&, const BackwardTensors&, int);

}  // namespace divnorm::DIVNORM_ISA
