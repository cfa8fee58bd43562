// Forward: m, M2 -> mu = A[m] -> q = B[M2/n + (m - mu)^2] -> rstd = 1/sqrt(sigma^2 + q) -> y.
// For p = 1: m -> mu = A[m] -> M1 = sum of |x - mu| -> q = c_1 B[M1/n] -> rstd = 1/(|sigma| + q) -> y.
#pragma once

#include <cmath>
#include <initializer_list>

#include "box.h"
#include "parameters.h"
#include "smooth.h"
#include "traversal.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kForwardMaps = 2;  // of scratch

// What the threads of a call share, and what is so whatever type x has.
template <class A>
struct ForwardCall {
  const Problem& problem;
  const ForwardTensors& tensors;
  const Traversal& traversal;
  const A *weight, *bias, *sigma;             // sigma: one per group
  const A *zeros, *ones;                      // neutral rows of one tile
  const Divisors<A>&summation, &suppression;  // those of the suppression are inverse
  double* l1_partials;                        // (blocks, segments, finish_tiles), or null
  A* team_scratch;                            // kForwardMaps a team
  const Boxes<A>& boxes;
};

template <class T>
struct ForwardShared : ForwardCall<Acc<T>> {
  const Beside<T> beside;
  const SmoothRooms<Acc<T>>& smooth;
  bool stream;
};

// The maps of a unit, and what is made of them between the looks at the tensors.
template <class A>
class ForwardMaps {
 public:
  void start(const Unit& unit, int64_t block, bool) {
    const Problem& p = call_.problem;
    const int64_t positions = p.positions();
    const int64_t at = ((p.over_batch ? 0 : unit.sample) * p.groups + unit.group) * positions;
    unit_ = unit;
    mean_ = {static_cast<A*>(call_.tensors.mean) + (p.summation.present ? at : 0), positions};
    rstd_ = {static_cast<A*>(call_.tensors.rstd) + (p.suppression.present ? at : 0), positions};
    m_.first_row = z_.first_row = 0;
    if (call_.l1_partials != nullptr)
      l1_ = call_.l1_partials + (block * call_.traversal.segments + unit.group) * call_.traversal.finish_tiles;
  }

  void slide(int64_t keep_row, int64_t end, bool move) {
    for (SlidingMap<A>* map : {&m_, &z_}) map->slide(unit_.groups, keep_row, end, move);
  }

  // mu = A[m]; z = M2/n + (m - mu)^2, or without a mean c M_p/n
  void first(int64_t begin, int64_t end) {
    const Problem& p = call_.problem;
    const A per_channel = A(1) / (p.group_channels() * unit_.samples);
    for (int64_t group = 0; group < unit_.groups; ++group) {
      if (!p.summation.present) {
        for (int64_t i = begin; i < end; ++i) scale_line(call_.traversal.line, scale(), z_.row(group, i));
        continue;
      }
      const auto source = [&](int64_t i) { return static_cast<const A*>(m_.row(group, i)); };
      call_.boxes.summation.lines(begin, end, source, box_buffers_, [&](int64_t i, int64_t h, const A* sums) {
        const int64_t at = p.position(i, h);
        local_squares(p.extent[2], call_.summation.line(i, h), per_channel, sums, m_.at(group, at), mean_.at(group, at),
                      z_.at(group, at));
      });
    }
  }

  bool looks_again() const {
    const Problem& p = call_.problem;
    return p.p == 1 && p.summation.present && p.suppression.present;
  }

  // rstd = 1 / sqrt(sigma^2 + B[z]), for p = 1 1 / (|sigma| + B[z])
  void second(int64_t begin, int64_t end) {
    const Problem& p = call_.problem;
    if (!p.suppression.present) return;
    for (int64_t group = 0; group < unit_.groups; ++group) {
      const A sigma = call_.sigma[unit_.group + group];
      const auto source = [&](int64_t i) { return static_cast<const A*>(z_.row(group, i)); };
      call_.boxes.suppression.lines(begin, end, source, box_buffers_, [&](int64_t i, int64_t h, const A* sums) {
        A* rstd = rstd_.at(group, p.position(i, h));
        if (p.p == 1)
          inverse_deviations(p.extent[2], call_.suppression.line(i, h), InverseMeanDeviation<A>(sigma), sums, rstd);
        else
          inverse_deviations(p.extent[2], call_.suppression.line(i, h), InverseDeviation<A>(sigma), sums, rstd);
      });
    }
  }

 protected:
  ForwardMaps(const ForwardCall<A>& call, int team, int thread)
      : call_(call), box_buffers_(call.boxes.buffers(thread)) {
    const Traversal& t = call_.traversal;
    A* scratch = call_.team_scratch + team * kForwardMaps * t.scratch_row_numbers();
    m_ = {scratch, t.line, t.capacity_rows};
    z_ = {scratch + t.scratch_row_numbers(), t.line, t.capacity_rows};
  }

  static Map<const A> neutral(const A* row) { return {row, 0, 0, true}; }

  // What makes a sum over the channels c_p times their average.
  A scale() const {
    return static_cast<A>(deviation_scale(call_.problem.p)) / (call_.problem.group_channels() * unit_.samples);
  }

  static void scale_line(int64_t line, A scale, A* __restrict z) {
    for (int64_t j = 0; j < line; ++j) z[j] *= scale;
  }

  const ForwardCall<A>& call_;
  BoxBuffers<A> box_buffers_;
  Unit unit_;
  SlidingMap<A> m_, z_;  // z holds M2 until a row of it is filtered
  Map<A> mean_, rstd_;
  double* l1_ = nullptr;

 private:
  static void local_squares(int64_t count, LineDivisors<A> divisors, A per_channel, const A* __restrict sums,
                            const A* __restrict m, A* __restrict mu, A* __restrict z) {
    for (int64_t j = 0; j < count; ++j) {
      mu[j] = sums[j] / divisors[j];
      const A difference = m[j] - mu[j];
      z[j] = z[j] * per_channel + difference * difference;
    }
  }

  template <class Inverse>
  static void inverse_deviations(int64_t count, LineDivisors<A> shares, Inverse of, const A* __restrict sums,
                                 A* __restrict rstd) {
    for (int64_t j = 0; j < count; ++j) rstd[j] = of(sums[j] * shares[j]);
  }
};

template <class T, class Layout>
class ForwardPass : public ForwardMaps<Acc<T>> {
 public:
  using A = Acc<T>;

  ForwardPass(const ForwardShared<T>& shared, int team, int thread)
      : Maps(shared, team, thread), s_(shared), smooth_room_(shared.smooth.of(thread)) {}

  void reduce(Tile tile, int64_t) {
    const T* x = static_cast<const T*>(s_.tensors.x);
    if (s_.problem.summation.present)
      Layout::moments(s_.problem, unit_, x, tile, m_, z_);
    else if (s_.problem.suppression.present && s_.problem.p == 1)
      Layout::absolutes(s_.problem, unit_, x, tile, neutral(s_.zeros), z_);
    else if (s_.problem.suppression.present)
      Layout::squares(s_.problem, unit_, x, tile, z_);
  }

  // z = c_1 M1/n
  void again(Tile tile) {
    Layout::absolutes(s_.problem, unit_, static_cast<const T*>(s_.tensors.x), tile, mean_, z_);
    for (int64_t group = 0; group < unit_.groups; ++group)
      this->scale_line(tile.size(), this->scale(), z_.at(group, tile.begin));
  }

  void finish(Tile tile, int64_t index) {
    T* y = static_cast<T*>(s_.tensors.y);
    const bool stream = s_.stream && Layout::streamable(s_.problem, unit_, y, tile);
    const Map<const A> mean = s_.problem.summation.present ? Map<const A>(mean_) : neutral(s_.zeros);
    const Map<const A> offset = s_.problem.subtract_mean ? mean : neutral(s_.zeros);
    const Map<const A> rstd = s_.problem.suppression.present ? Map<const A>(rstd_) : neutral(s_.ones);
    const T* x = static_cast<const T*>(s_.tensors.x);
    const auto run = [&](auto epilogue) {
      const auto normalize = [&](auto stream, auto l1) -> double {
        return Layout::template normalize<stream.value, l1.value>(s_.problem, unit_, x, tile, mean, offset, rstd,
                                                                  s_.weight, s_.bias, epilogue, y);
      };
      return specialize_if<Layout::kMayStream>(normalize, stream, s_.l1_partials != nullptr);
    };
    const SmoothRows<T, typename Layout::Wide> smooth(s_.problem, s_.beside, smooth_room_);
    const double l1 = is_smooth(s_.problem) ? run(smooth) : with_epilogue<T>(s_.problem, s_.beside, run);
    if (s_.l1_partials != nullptr) l1_[index] += l1;
    if (stream) stream_fence();
  }

 private:
  using Maps = ForwardMaps<A>;
  using Maps::l1_;
  using Maps::m_;
  using Maps::mean_;
  using Maps::neutral;
  using Maps::rstd_;
  using Maps::unit_;
  using Maps::z_;

  const ForwardShared<T>& s_;
  SmoothRoom<A> smooth_room_;
};

}  // namespace divnorm::DIVNORM_ISA
