// What is computed of vectors side by side, for all channels: y, or dx and what dlearned sums.
#pragma once

#include <array>

#include "channel_pools.h"
#include "channel_rows.h"
#include "powers.h"

namespace divnorm::DIVNORM_ISA {

// The scalars of a call, in the type of the sums.
template <class A>
struct Numbers {
  A k, a, rho;
  Exponents<A> exponents;

  explicit Numbers(const ChannelScalars& scalars)
      : k(read(scalars, kScalarK)),
        a(read(scalars, kScalarA)),
        rho(read(scalars, kScalarRho)),
        exponents(read(scalars, kScalarBeta), !scalars.learns(kScalarBeta)) {}

 private:
  static A read(const ChannelScalars& scalars, Scalar which) {
    const double value = scalars.value[which];
    return quiet<A>(scalars.learns(which) ? static_cast<const A*>(scalars.learned)[which] : value);
  }
};

// Which powers a loop is compiled for, and whether x^2 stands in the numerator; that, which goes with exponents that
// are learned, for any power alone.
template <Power P, bool Squared>
struct Form {
  static constexpr Power power = P;
  static constexpr bool squared = Squared;
};

template <class T, class Body>
inline void with_form(Power power, bool squared, Body&& body) {
  if (squared) return body(Form<Power::any, true>{});
  if constexpr (!kGeneral<T>) switch (power) {
      case Power::half: return body(Form<Power::half, false>{});
      case Power::three_quarters: return body(Form<Power::three_quarters, false>{});
      case Power::one: return body(Form<Power::one, false>{});
      case Power::any: break;
    }
  body(Form<Power::any, false>{});
}

// The vectors side by side at some positions of a tile, and whether they go out past the cache.
template <class A, int Chains>
struct Group {
  RowsView<const A> x, dy;
  RowsView<A> out;  // y or dx
  bool streams;

  Vec<A> read(const RowsView<const A>& rows, int64_t c, int j) const { return load<Vec<A>>(rows.at(c, j * kLanes<A>)); }
  // Asks for the numbers of the same channel some groups on.
  void read_ahead(const RowsView<const A>& rows, int64_t c) const { __builtin_prefetch(rows.at(c, kAhead)); }
  void write(int64_t c, int j, Vec<A> v) const {
    A* to = out.at(c, j * kLanes<A>);
    if (streams)
      DIVNORM_ISA::write<kStreams<A>>(to, v);
    else
      store(to, v);
  }

 private:
  static constexpr int64_t kAhead = 4 * 64 / sizeof(A);
};

// What a thread of a pass has of its own, and of every pass.
template <class A>
class Pass {
 public:
  using V = Vec<A>;

  Pass(const ChannelProblem& problem, const Numbers<A>& numbers, bool slopes)
      : problem_(problem),
        numbers_(numbers),
        suffixes_(problem.exponential ? 0 : ChannelWindow(problem).size() * kMostChains),
        behind_(problem.exponential ? problem.channels * kMostChains : 0),
        slopes_behind_(slopes ? problem.channels * kMostChains : 0) {}

 protected:
  // finish(c, j, powers of the divisor, pool, slope) for each of the channels and vectors; the slopes of the pool by
  // rho are there where they are wanted.
  template <class Form, bool Slopes, int Chains, class Finish>
  void each_divisor(const Group<A, Chains>& group, Finish finish) const {
    const auto square = [group](int64_t c, int j) {
      const V x = group.read(group.x, c, j);
      return x * x;
    };
    const V k = splat<V>(numbers_.k), a = splat<V>(numbers_.a);
    const Exponents<A> exponents = numbers_.exponents;
    const auto emit = [=](int64_t c, const auto& sums, const auto&... slopes) {
      group.read_ahead(group.x, c);
      V d[Chains];
      Bits<V> seen{};
      for (int j = 0; j < Chains; ++j) seen = exponents.seen(seen, d[j] = fused(a, sums.of[j], k));
      if (exponents.plain(seen))
        for (int j = 0; j < Chains; ++j)
          finish(c, j, exponents.template of_plain<Form::power>(d[j]), sums.of[j], slopes.of[j]...);
      else
        for (int j = 0; j < Chains; ++j)
          finish(c, j, exponents.template of_any<Form::power>(d[j]), sums.of[j], slopes.of[j]...);
    };
    if (problem_.exponential)
      sum_decaying<Slopes, A, Chains>(problem_.channels, numbers_.rho, behind_.data(), slopes_behind_.data(), square,
                                      emit);
    else if constexpr (!Slopes)
      sum_boxes<A, Chains>(problem_.channels, ChannelWindow(problem_), suffixes_.data(), square, emit);
  }

  const ChannelProblem& problem_;
  const Numbers<A>& numbers_;
  Buffer<V> suffixes_, behind_, slopes_behind_;
};

template <class A>
class ForwardPass : Pass<A> {
 public:
  using typename Pass<A>::V;

  ForwardPass(const ChannelProblem& problem, const Numbers<A>& numbers) : Pass<A>(problem, numbers, false) {}

  template <class Form, int Chains>
  void run(Form, const Group<A, Chains>& group) {
    this->template each_divisor<Form, false>(group, [group](int64_t c, int j, const auto& of, V) {
      const V x = group.read(group.x, c, j);
      group.write(c, j, Form::squared ? x * x * of.power : x * of.power);
    });
  }
};

// What dx has of the numerator, and u = dy n D^-(beta + 1).
template <class Form, class V>
struct Weighed {
  V passed, whole, u;

  Weighed(V x, V dy, const Powers<V>& of) {
    const V scaled = dy * of.power, part = scaled * x;
    whole = Form::squared ? part * x : part;
    u = whole * of.inverse;
    passed = Form::squared ? part + part : scaled;
  }
};

// Sums over all numbers: of dk, da, dbeta and drho but for their factors.
using ScalarSums = std::array<double, kScalars>;

template <class A>
class ScalarTotals {
 public:
  using V = Vec<A>;

  template <class Form>
  void add(const Weighed<Form, V>& found, const Powers<V>& of, V pool) {
    totals_[kScalarK] += found.u;
    totals_[kScalarA] += found.u * pool;
    if constexpr (Form::power == Power::any) totals_[kScalarBeta] += found.whole * of.logarithm;
  }
  void add_slope(V u, V slope) { totals_[kScalarRho] += u * slope; }

  // Those since they were taken last.
  ScalarSums take() {
    ScalarSums taken;
    for (int i = 0; i < kScalars; ++i) taken[i] = lane_sum<A>(totals_[i]);
    for (V& total : totals_) total = V{};
    return taken;
  }

 private:
  V totals_[kScalars] = {};
};

template <class A>
class BackwardPass : Pass<A> {
 public:
  using typename Pass<A>::V;

  BackwardPass(const ChannelProblem& problem, const Numbers<A>& numbers, const ChannelBackward& call)
      : Pass<A>(problem, numbers, learns_rho(problem, call)),
        learns_(call.dlearned != nullptr),
        slopes_(learns_rho(problem, call)),
        wants_dx_(call.dx != nullptr),
        passed_(problem.channels * kMostChains),
        weighed_(problem.channels * kMostChains) {}

  template <class Form, int Chains>
  void run(Form, const Group<A, Chains>& group) {
    if (!learns_) weigh<Form, false, false>(group);
    if (learns_) specialize([&](auto slopes) { this->template weigh<Form, true, slopes>(group); }, slopes_);
    if (wants_dx_) finish_dx(group);
  }

  ScalarSums take_sums() { return totals_.take(); }

 private:
  static bool learns_rho(const ChannelProblem& problem, const ChannelBackward& call) {
    return problem.exponential && call.dlearned != nullptr && call.scalars.learns(kScalarRho);
  }

  template <class Form, bool Learns, bool Slopes, int Chains>
  void weigh(const Group<A, Chains>& group) {
    const auto finish = [group, passed = passed_.data(), weighed = weighed_.data(), totals = &totals_](
                            int64_t c, int j, const auto& of, V pool, const auto&... slope) {
      if (j == 0) group.read_ahead(group.dy, c);
      const Weighed<Form, V> found(group.read(group.x, c, j), group.read(group.dy, c, j), of);
      if constexpr (Learns) {
        totals->add(found, of, pool);
        (totals->add_slope(found.u, slope), ...);
      }
      passed[c * Chains + j] = found.passed;
      weighed[c * Chains + j] = found.u;
    };
    this->template each_divisor<Form, Slopes>(group, finish);
  }

  // dx, with what x does in the divisors of its neighbours, by the transposed pool.
  template <int Chains>
  void finish_dx(const Group<A, Chains>& group) const {
    const V factor = splat<V>(-2 * this->numbers_.a * this->numbers_.exponents.beta());
    const auto u = [weighed = weighed_.data()](int64_t c, int j) { return weighed[c * Chains + j]; };
    const auto emit = [group, factor, passed = passed_.data()](int64_t c, const auto& sums) {
      for (int j = 0; j < Chains; ++j)
        group.write(c, j, fused<V>(factor * group.read(group.x, c, j), sums.of[j], passed[c * Chains + j]));
    };
    const int64_t channels = this->problem_.channels;
    if (this->problem_.exponential)
      sum_decaying<false, A, Chains>(channels, this->numbers_.rho, this->behind_.data(), nullptr, u, emit);
    else
      sum_boxes<A, Chains>(channels, ChannelWindow(this->problem_).transposed(), this->suffixes_.data(), u, emit);
  }

  bool learns_, slopes_, wants_dx_;
  Buffer<V> passed_, weighed_;
  ScalarTotals<A> totals_;
};

}  // namespace divnorm::DIVNORM_ISA
