// The work on the activation itself for x of shape (batch, positions, channels), channels contiguous.
// Channels lie in the lanes. One unit holds all groups, since a pixel's groups share its cache lines.
#pragma once

#include "unit.h"

namespace divnorm::DIVNORM_ISA {

template <class T>
struct ChannelsLast {
  using A = Acc<T>;

  static int64_t offset(const Problem& problem, int64_t sample, int64_t channel, int64_t position) {
    return (sample * problem.positions() + position) * problem.channels + channel;
  }

  // As ChannelsFirst::moments. A pixel's channels are in the nearest cache after the first look, so the sum of
  // (x - mean)^2 is a second look at them; it also gives the mean's own rounding error, which is then added to it.
  [[gnu::flatten]] static void moments(const Problem& problem, const Unit& unit, const T* x, Tile tile, Map<A> mean,
                                       Map<A> m2) {
    const int64_t n = problem.group_channels();
    each_pixel(problem, unit, tile, [&](int64_t start, int64_t position, int64_t group, int64_t, int64_t seen) {
      const T* in = x + start;
      Sum<1> total;
      for_lanes<A>(n, [&](auto lane, int64_t i) { total.add(0, load<decltype(lane)>(in + i)); });
      const A average = total.value(0) / n;
      Sum<2> about;
      for_lanes<A>(n, [&](auto lane, int64_t i) {
        using V = decltype(lane);
        const V centred = load<V>(in + i) - splat<V>(average);
        about.add(0, centred);
        about.add(1, centred * centred);
      });
      const A error = about.value(0) / n;
      const A own_mean = error - error == 0 ? average + error : average;
      const A own_m2 = about.value(1) - about.value(0) * error;
      A& mean_out = *mean.at(group, position);
      A& m2_out = *m2.at(group, position);
      if (seen == 0) {
        mean_out = own_mean;
        m2_out = own_m2;
      } else {
        const A step = own_mean - mean_out, share = A(1) / (seen + 1);
        const A merged = mean_out + step * share;
        mean_out = step - step == 0 ? merged : mean_out + own_mean;
        m2_out += own_m2 + step * step * (n * seen * share);
      }
    });
  }

  [[gnu::flatten]] static void squares(const Problem& problem, const Unit& unit, const T* x, Tile tile, Map<A> m2) {
    const int64_t n = problem.group_channels();
    each_pixel(problem, unit, tile, [&](int64_t start, int64_t position, int64_t group, int64_t, int64_t seen) {
      Sum<1> total;
      for_lanes<A>(n, [&](auto lane, int64_t i) {
        const auto value = load<decltype(lane)>(x + start + i);
        total.add(0, value * value);
      });
      A& out = *m2.at(group, position);
      out = (seen == 0 ? 0 : out) + total.value(0);
    });
  }

  template <bool Stream, bool L1>
  [[gnu::flatten]] static double normalize(const Problem& problem, const Unit& unit, const T* x, Tile tile,
                                           Map<const A> mean, Map<const A> rstd, const A* weight, const A* bias, T* y) {
    double l1 = 0;
    each_pixel(problem, unit, tile, [&](int64_t start, int64_t position, int64_t group, int64_t channel, int64_t) {
      const T* in = x + start;
      T* out = y + start;
      const A average = *mean.at(group, position), scale = *rstd.at(group, position);
      Sum<1> absolutes;
      for_lanes_writing<A, Stream>(out, problem.group_channels(), [&](auto lane, int64_t i) {
        using V = decltype(lane);
        const V centred = load<V>(in + i) - splat<V>(average);
        write<Stream>(out + i, centred * splat<V>(scale) * load<V>(weight + channel + i) + load<V>(bias + channel + i));
        if constexpr (L1) absolutes.add(0, absolute(centred));
      });
      if constexpr (L1) l1 += absolutes.value(0);
    });
    return l1;
  }

  template <bool Signs>
  [[gnu::flatten]] static void gradient_sums(const Problem& problem, const Unit& unit, const T* x, const T* dy,
                                             Tile tile, Map<const A> mean, Map<const A> rstd, const A* weight,
                                             Map<A> p1, Map<A> p2, Map<A> v, Map<A> signs, A* dweight, A* dbias) {
    each_pixel(problem, unit, tile, [&](int64_t start, int64_t position, int64_t group, int64_t channel, int64_t seen) {
      const T* in = x + start;
      const T* grads = dy + start;
      const A average = *mean.at(group, position), scale = *rstd.at(group, position);
      Sum<4> sums;
      for_lanes<A>(problem.group_channels(), [&](auto lane, int64_t i) {
        using V = decltype(lane);
        const int64_t at = channel + i;
        const V grad = load<V>(grads + i);
        const V centred = load<V>(in + i) - splat<V>(average);
        const V w = load<V>(weight + at);
        const V product = grad * centred;
        sums.add(0, w * grad);
        sums.add(1, w * product);
        sums.add(2, centred);
        if constexpr (Signs) sums.add(3, sign(centred));
        store(dweight + at, load<V>(dweight + at) + product * splat<V>(scale));
        store(dbias + at, load<V>(dbias + at) + grad);
      });
      accumulate(p1, group, position, seen, sums.value(0));
      accumulate(p2, group, position, seen, sums.value(1));
      accumulate(v, group, position, seen, sums.value(2));
      if constexpr (Signs) accumulate(signs, group, position, seen, sums.value(3));
    });
  }

  template <bool Stream, bool Signs>
  [[gnu::flatten]] static void gradient_input(const Problem& problem, const Unit& unit, const T* x, const T* dy,
                                              Tile tile, Map<const A> mean, Map<const A> rstd, Map<const A> a,
                                              Map<const A> e, const A* weight, A l1_scale, T* dx) {
    each_pixel(problem, unit, tile, [&](int64_t start, int64_t position, int64_t group, int64_t channel, int64_t) {
      const T* in = x + start;
      const T* grad = dy + start;
      T* out = dx + start;
      const A average = *mean.at(group, position), scale = *rstd.at(group, position);
      const A slope = *a.at(group, position), shift = *e.at(group, position);
      for_lanes_writing<A, Stream>(out, problem.group_channels(), [&](auto lane, int64_t i) {
        using V = decltype(lane);
        const V centred = load<V>(in + i) - splat<V>(average);
        V result = load<V>(weight + channel + i) * load<V>(grad + i) * splat<V>(scale) - splat<V>(slope) * centred -
                   splat<V>(shift);
        if constexpr (Signs) result += splat<V>(l1_scale) * sign(centred);
        write<Stream>(out + i, result);
      });
    });
  }

 private:
  // Several running sums, each over vectors and single numbers.
  template <int Count>
  struct Sum {
    Vec<A> lanes[Count] = {};
    A tail[Count] = {};

    template <class V>
    void add(int which, V v) {
      if constexpr (is_scalar<V>)
        tail[which] += v;
      else
        lanes[which] += v;
    }
    A value(int which) const { return lane_sum<A>(lanes[which]) + tail[which]; }
  };

  static void accumulate(Map<A> map, int64_t group, int64_t position, int64_t seen, A value) {
    A& out = *map.at(group, position);
    out = (seen == 0 ? 0 : out) + value;
  }

  // body(offset of the group's first channel, position, group, that channel, samples seen before)
  template <class Body>
  static void each_pixel(const Problem& problem, const Unit& unit, Tile tile, Body&& body) {
    const int64_t n = problem.group_channels();
    for (int64_t seen = 0; seen < unit.samples; ++seen)
      for (int64_t position = tile.begin; position < tile.end; ++position) {
        const int64_t start = offset(problem, unit.sample + seen, 0, position);
        for (int64_t group = 0; group < problem.groups; ++group)
          body(start + group * n, position, group, group * n, seen);
      }
  }
};

}  // namespace divnorm::DIVNORM_ISA
