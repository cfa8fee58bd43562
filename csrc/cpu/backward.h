// Backward: P1, P2/s, V -> t = P2/s^3 -> a = B'[t]/n -> d = P1/s - a V -> e = A'[d]/n -> dx = g/s - a v - e.
// For p = 1: t = c_1 P2/s^2, and sign(v) takes the place of v in V and dx. With x in the numerator P2 is of x, and d
// has no P1/s. t is a number of its own, so like the squares it has to be in the range of A: in float32 where v is not
// small beside s, for s down to about 1e-19.
#pragma once

#include <initializer_list>

#include "box.h"
#include "parameters.h"
#include "smooth.h"
#include "traversal.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kBackwardMaps = 4;  // of scratch

// What the threads of a call share, and what is so whatever type x has.
template <class A>
struct BackwardCall {
  const Problem& problem;
  const BackwardTensors& tensors;
  const Traversal& traversal;
  const A *weight, *bias;
  const A *zeros, *ones;  // neutral rows of one tile
  const Divisors<A>&summation, &suppression;
  A l1_scale;           // dl1 / numel
  A* dweight_partials;  // (partial_rows, affine_size)
  A* dbias_partials;
  A* dthreshold_partials;  // or null
  double* sigma_partials;  // (blocks, reduce_tiles, groups): sum of P2 / s^3
  A* team_scratch;         // kBackwardMaps a team
  const Boxes<A>& boxes;   // mirrored
};

template <class T>
struct BackwardShared : BackwardCall<Acc<T>> {
  const Beside<T> beside;
  const SmoothRooms<Acc<T>>& smooth;
  bool stream;
};

// The maps of a unit, and what is made of them between the looks at the tensors.
template <class A>
class BackwardMaps {
 public:
  void start(const Unit& unit, int64_t block, bool fresh) {
    const Problem& p = call_.problem;
    const int64_t positions = p.positions();
    const int64_t at = ((p.over_batch ? 0 : unit.sample) * p.groups + unit.group) * positions;
    unit_ = unit;
    block_ = block;
    fresh_ = fresh;
    mean_ = p.summation.present ? Map<const A>{static_cast<const A*>(call_.tensors.mean) + at, positions}
                                : Map<const A>{call_.zeros, 0, 0, true};
    rstd_ = p.suppression.present ? Map<const A>{static_cast<const A*>(call_.tensors.rstd) + at, positions}
                                  : Map<const A>{call_.ones, 0, 0, true};
    offset_ = p.subtract_mean ? mean_ : Map<const A>{call_.zeros, 0, 0, true};
    for (SlidingMap<A>* map : {&t_, &d_, &a_, &e_}) map->first_row = 0;
  }

  void slide(int64_t keep_row, int64_t end, bool move) {
    for (SlidingMap<A>* map : {&t_, &d_, &a_, &e_}) map->slide(unit_.groups, keep_row, end, move);
  }

  bool looks_again() const { return false; }
  void again(Tile) {}

  // a = B'[t]/n; d = P1/s - a V
  void first(int64_t begin, int64_t end) {
    const Problem& p = call_.problem;
    const int64_t line = call_.traversal.line;
    const A per_channel = A(1) / (p.group_channels() * unit_.samples);
    for (int64_t group = 0; group < unit_.groups; ++group) {
      if (p.suppression.present) {
        const auto source = [&](int64_t i) { return static_cast<const A*>(t_.row(group, i)); };
        call_.boxes.suppression.lines(begin, end, source, box_buffers_, [&](int64_t i, int64_t h, const A* sums) {
          const int64_t at = p.position(i, h);
          local_slopes(p.extent[2], per_channel, sums, a_.at(group, at), d_.at(group, at));
        });
      }
      for (int64_t i = begin; p.summation.present && i < end; ++i)
        average(p, call_.summation, i * line, line, per_channel, d_.row(group, i));
    }
  }

  // e = A'[d]/n
  void second(int64_t begin, int64_t end) {
    const Problem& p = call_.problem;
    for (int64_t group = 0; p.summation.present && group < unit_.groups; ++group) {
      const auto source = [&](int64_t i) { return static_cast<const A*>(d_.row(group, i)); };
      call_.boxes.summation.lines(begin, end, source, box_buffers_, [&](int64_t i, int64_t h, const A* sums) {
        __builtin_memcpy(e_.at(group, p.position(i, h)), sums, p.extent[2] * sizeof(A));
      });
    }
  }

 protected:
  BackwardMaps(const BackwardCall<A>& call, int team, int thread)
      : call_(call), box_buffers_(call.boxes.buffers(thread)) {
    const Traversal& t = call_.traversal;
    A* scratch = call_.team_scratch + team * kBackwardMaps * t.scratch_row_numbers();
    for (SlidingMap<A>* map : {&t_, &d_, &a_, &e_}) {
      *map = {scratch, t.line, t.capacity_rows};
      scratch += t.scratch_row_numbers();
    }
  }

  // This tile's share: all the unit's channels, or in the (N, F) form the tile's own positions.
  void clear_partials(Tile tile, std::initializer_list<A*> partials, double* sigma) const {
    const Problem& p = call_.problem;
    const int64_t first = p.affine_per_position ? tile.begin : unit_.group * p.group_channels();
    const int64_t count = p.affine_per_position ? tile.size() : unit_.groups * p.group_channels();
    for (A* partial : partials)
      if (partial != nullptr) __builtin_memset(partial + first, 0, count * sizeof(A));
    __builtin_memset(sigma, 0, unit_.groups * sizeof(double));
  }

  // What a tile's sums become before they are filtered; adds to every group's `sigma`.
  void combine_sums(Tile tile, double* sigma) const {
    const Problem& p = call_.problem;
    for (int64_t group = 0; group < unit_.groups; ++group) {
      sigma[group] += combine_sums(group, tile);
      if (p.suppression.present)
        average(p, call_.suppression, tile.begin, tile.size(), static_cast<A>(deviation_scale(p.p)),
                Map<A>(t_).at(group, tile.begin));
    }
  }

  const BackwardCall<A>& call_;
  BoxBuffers<A> box_buffers_;
  Unit unit_;
  int64_t block_ = 0;
  bool fresh_ = false;
  Map<const A> mean_, offset_, rstd_;
  SlidingMap<A> t_, d_, a_, e_;

 private:
  // t = P2/s rstd^p, d = P1 rstd + l1 * sum of signs and for p = 1 V = sum of signs on the tile; returns the sum of t.
  double combine_sums(int64_t group, Tile tile) const {
    const Problem& p = call_.problem;
    const A* rstd = rstd_.at(group, tile.begin);
    const A* signs = Map<A>(e_).at(group, tile.begin);
    A* t = Map<A>(t_).at(group, tile.begin);
    A* d = Map<A>(d_).at(group, tile.begin);
    if (p.p == 1) {
      for (int64_t i = 0; i < tile.size(); ++i) t[i] *= rstd[i];
      __builtin_memcpy(Map<A>(a_).at(group, tile.begin), signs, tile.size() * sizeof(A));
    } else {
      for (int64_t i = 0; i < tile.size(); ++i) t[i] = t[i] * rstd[i] * rstd[i];  // rstd^2 alone could overflow
    }
    if (p.subtract_mean)
      for (int64_t i = 0; i < tile.size(); ++i) d[i] *= rstd[i];
    else
      __builtin_memset(d, 0, tile.size() * sizeof(A));
    if (call_.l1_scale != 0)
      for (int64_t i = 0; i < tile.size(); ++i) d[i] += call_.l1_scale * signs[i];
    return sum_line(t, tile.size());
  }

  // a holds V until here
  static void local_slopes(int64_t line, A per_channel, const A* __restrict sums, A* __restrict a, A* __restrict d) {
    for (int64_t j = 0; j < line; ++j) {
      const A slope = sums[j] * per_channel;
      d[j] -= slope * a[j];
      a[j] = slope;
    }
  }
};

template <class T, class Layout>
class BackwardPass : public BackwardMaps<Acc<T>> {
 public:
  using A = Acc<T>;

  BackwardPass(const BackwardShared<T>& shared, int team, int thread)
      : Maps(shared, team, thread), s_(shared), smooth_room_(shared.smooth.of(thread)) {}

  void reduce(Tile tile, int64_t index) {
    const Problem& p = s_.problem;
    const int64_t row = s_.traversal.partial_row(block_, index);
    A* dweight = s_.dweight_partials + row * p.affine_size();
    A* dbias = s_.dbias_partials + row * p.affine_size();
    double* sigma = s_.sigma_partials + (block_ * s_.traversal.reduce_tiles + index) * p.groups + unit_.group;
    A* dthreshold = s_.dthreshold_partials == nullptr ? nullptr : s_.dthreshold_partials + row * p.affine_size();
    if (fresh_) this->clear_partials(tile, {dweight, dbias, dthreshold}, sigma);
    with_kinks<T>(p, s_.beside, s_.l1_scale != 0, [&](auto epilogue, auto kinks, auto sloped) {
      // e is free until its rows are filtered: it carries the signs to the end of this function
      Layout::template gradient_sums<kinks.value>(
          p, unit_, static_cast<const T*>(s_.tensors.x), gradients<sloped.value>(Look::first), tile, mean_, offset_,
          rstd_, s_.weight, s_.bias, epilogue, d_, t_, a_, e_, dweight, dbias, dthreshold);
    });
    this->combine_sums(tile, sigma);
  }

  void finish(Tile tile, int64_t) {
    const Map<const A> zero{s_.zeros, 0, 0, true};
    const Map<const A> a = s_.problem.suppression.present ? Map<const A>(a_) : zero;
    const Map<const A> e = s_.problem.summation.present ? Map<const A>(e_) : zero;
    T* dx = static_cast<T*>(s_.tensors.dx);
    const bool stream = s_.stream && Layout::streamable(s_.problem, unit_, dx, tile);
    with_kinks<T>(s_.problem, s_.beside, s_.l1_scale != 0, [&](auto epilogue, auto kinks, auto sloped) {
      with_exponent<kinks.value>(s_.problem, [&](auto exponent) {
        const auto run = [&](auto stream) {
          Layout::template gradient_input<stream.value, kinks.value, exponent.value>(
              s_.problem, unit_, static_cast<const T*>(s_.tensors.x), gradients<sloped.value>(Look::second), tile,
              mean_, offset_, rstd_, a, e, s_.weight, s_.bias, epilogue, s_.l1_scale, dx);
        };
        specialize_if<Layout::kMayStream>(run, stream);
      });
    });
    if (stream) stream_fence();
  }

 private:
  template <bool Sloped>
  Gradients<T, typename Layout::Wide, Sloped> gradients(Look look) {
    return {s_.problem, s_.beside, smooth_room_, static_cast<const T*>(s_.tensors.dy), look};
  }

  using Maps = BackwardMaps<A>;
  using Maps::a_;
  using Maps::block_;
  using Maps::d_;
  using Maps::e_;
  using Maps::fresh_;
  using Maps::mean_;
  using Maps::offset_;
  using Maps::rstd_;
  using Maps::t_;
  using Maps::unit_;

  const BackwardShared<T>& s_;
  SmoothRoom<A> smooth_room_;
};

}  // namespace divnorm::DIVNORM_ISA
