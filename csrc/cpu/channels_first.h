// The work on the activation itself for x of shape (batch, channels, positions), positions contiguous.
// Pixels lie in the lanes; channels stream by four at a time. One unit is one group.
#pragma once

#include <initializer_list>

#include "unit.h"

namespace divnorm::DIVNORM_ISA {

constexpr int kRows = 4;  // channels taken at once: their loads share the maps' loads and stores

// PerPosition: the (N, F) form, whose weight and bias run along the positions of the one channel.
// Every kernel is flattened: only inlined do the sums stay in registers.
template <class T, bool PerPosition>
struct ChannelsFirst {
  using A = Acc<T>;

  static int64_t offset(const Problem& problem, int64_t sample, int64_t channel, int64_t position) {
    return (sample * problem.channels + channel) * problem.positions() + position;
  }

  // mean = average over the unit's samples and channels, m2 = sum of (x - mean)^2.
  // Sums are of x - pivot, the mean of the pixel's first channels, so an offset common to all costs no digits;
  // m2 is merged block by block about the mean so far (Chan et al. 1983), never from E[x^2] - E[x]^2.
  [[gnu::flatten]] static void moments(const Problem& problem, const Unit& unit, const T* x, Tile tile, Map<A> mean,
                                       Map<A> m2) {
    alignas(kVectorBytes) A pivot[kTilePositions], sum[kTilePositions];
    A* m2_row = m2.at(0, tile.begin);
    const int64_t stride = problem.positions();
    int64_t seen = 0;
    each_block(problem, unit, x, tile, [&](auto rows, const T* block, int64_t) {
      constexpr int R = rows.value;
      if (seen == 0) {
        for_lanes<A>(tile.size(), [&](auto lane, int64_t i) {
          using V = decltype(lane);
          V value[R], total = load<V>(block + i);
          value[0] = total;
          for (int r = 1; r < R; ++r) total += value[r] = load<V>(block + r * stride + i);
          const V average = total * splat<V>(A(1) / R);
          const V start = average - average == splat<V>(0) ? average : splat<V>(0);
          V shifted = splat<V>(0), squares = splat<V>(0);
          for (int r = 0; r < R; ++r) {
            const V centred = value[r] - start;
            shifted += centred;
            squares += centred * centred;
          }
          store(pivot + i, start);
          store(sum + i, shifted);
          store(m2_row + i, squares);
        });
      } else {
        const A per_seen = A(1) / seen, per_all = A(1) / (seen + R);
        for_lanes<A>(tile.size(), [&](auto lane, int64_t i) {
          using V = decltype(lane);
          for (int r = 0; r < R; ++r) __builtin_prefetch(block + (R + r) * stride + i);
          const V start = load<V>(pivot + i);
          const V total = load<V>(sum + i);
          const V average = total * splat<V>(per_seen);
          V shifted = splat<V>(0), squares = splat<V>(0);
          for (int r = 0; r < R; ++r) {
            const V value = load<V>(block + r * stride + i) - start;
            const V centred = value - average;
            shifted += value;
            squares += centred * centred;
          }
          const V drift = shifted - average * splat<V>(R);
          store(sum + i, total + shifted);
          store(m2_row + i, load<V>(m2_row + i) + (squares - drift * drift * splat<V>(per_all)));
        });
      }
      seen += R;
    });
    const A per_seen = A(1) / seen;
    A* mean_row = mean.at(0, tile.begin);
    for_lanes<A>(tile.size(), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(mean_row + i, load<V>(pivot + i) + load<V>(sum + i) * splat<V>(per_seen));
    });
  }

  // m2 = sum of x^2: the moments of a call that subtracts no mean.
  [[gnu::flatten]] static void squares(const Problem& problem, const Unit& unit, const T* x, Tile tile, Map<A> m2) {
    A* row = m2.at(0, tile.begin);
    const int64_t stride = problem.positions();
    for (int64_t i = 0; i < tile.size(); ++i) row[i] = 0;
    each_block(problem, unit, x, tile, [&](auto rows, const T* block, int64_t) {
      constexpr int R = rows.value;
      for_lanes<A>(tile.size(), [&](auto lane, int64_t i) {
        using V = decltype(lane);
        V sum = load<V>(row + i);
        for (int r = 0; r < R; ++r) {
          const V value = load<V>(block + r * stride + i);
          sum += value * value;
        }
        store(row + i, sum);
      });
    });
  }

  // y = weight * (x - mean) * rstd + bias; returns the sum of |x - mean| when L1 is set.
  template <bool Stream, bool L1>
  [[gnu::flatten]] static double normalize(const Problem& problem, const Unit& unit, const T* x, Tile tile,
                                           Map<const A> mean, Map<const A> rstd, const A* weight, const A* bias, T* y) {
    const A* mean_row = mean.at(0, tile.begin);
    const A* rstd_row = rstd.at(0, tile.begin);
    double l1 = 0;
    each_row(problem, unit, tile, [&](int64_t start, int64_t channel) {
      const T* in = x + start;
      T* out = y + start;
      Vec<A> l1_lanes{};
      A l1_tail = 0;
      for_lanes_writing<A, Stream>(out, tile.size(), [&](auto lane, int64_t i) {
        using V = decltype(lane);
        const V centred = load<V>(in + i) - load<V>(mean_row + i);
        const V scaled = centred * load<V>(rstd_row + i);
        const int64_t at = PerPosition ? tile.begin + i : channel;
        write<Stream>(out + i, scaled * affine<V>(weight + at) + affine<V>(bias + at));
        if constexpr (L1) {
          if constexpr (is_scalar<V>)
            l1_tail += absolute(centred);
          else
            l1_lanes += absolute(centred);
        }
      });
      if constexpr (L1) l1 += double(lane_sum<A>(l1_lanes)) + l1_tail;
    });
    return l1;
  }

  // p1 = sum of g, p2 = sum of g * v, v = sum of v (and signs = sum of sign(v)) over the unit's samples and channels,
  // with v = x - mean and g = weight * dy; dweight and dbias receive this tile's share.
  template <bool Signs>
  [[gnu::flatten]] static void gradient_sums(const Problem& problem, const Unit& unit, const T* x, const T* dy,
                                             Tile tile, Map<const A> mean, Map<const A> rstd, const A* weight,
                                             Map<A> p1, Map<A> p2, Map<A> v, Map<A> signs, A* dweight, A* dbias) {
    const A* mean_row = mean.at(0, tile.begin);
    const A* rstd_row = rstd.at(0, tile.begin);
    A* p1_row = p1.at(0, tile.begin);
    A* p2_row = p2.at(0, tile.begin);
    A* v_row = v.at(0, tile.begin);
    A* signs_row = Signs ? signs.at(0, tile.begin) : nullptr;
    for (A* row : {p1_row, p2_row, v_row, signs_row})
      for (int64_t i = 0; row != nullptr && i < tile.size(); ++i) row[i] = 0;
    const int64_t stride = problem.positions();
    each_block(problem, unit, x, tile, [&](auto rows, const T* block, int64_t channel) {
      constexpr int R = rows.value;
      const T* dy_block = dy + (block - x);
      Vec<A> weight_lanes[R] = {}, bias_lanes[R] = {};
      A weight_tail[R] = {}, bias_tail[R] = {};
      for_lanes<A>(tile.size(), [&](auto lane, int64_t i) {
        using V = decltype(lane);
        const V average = load<V>(mean_row + i), scale = load<V>(rstd_row + i);
        for (int r = 0; r < R; ++r) {
          __builtin_prefetch(block + (R + r) * stride + i);
          __builtin_prefetch(dy_block + (R + r) * stride + i);
        }
        V sum_g = load<V>(p1_row + i), sum_gv = load<V>(p2_row + i), sum_v = load<V>(v_row + i);
        V sum_sign = splat<V>(0);
        for (int r = 0; r < R; ++r) {
          const V grad = load<V>(dy_block + r * stride + i);
          const V centred = load<V>(block + r * stride + i) - average;
          const int64_t at = PerPosition ? tile.begin + i : channel + r;
          const V w = affine<V>(weight + at);
          const V product = grad * centred;
          sum_g += w * grad;
          sum_gv += w * product;
          sum_v += centred;
          if constexpr (Signs) sum_sign += sign(centred);
          if constexpr (PerPosition) {
            store(dweight + at, load<V>(dweight + at) + product * scale);
            store(dbias + at, load<V>(dbias + at) + grad);
          } else if constexpr (is_scalar<V>) {
            weight_tail[r] += product * scale;
            bias_tail[r] += grad;
          } else {
            weight_lanes[r] += product * scale;
            bias_lanes[r] += grad;
          }
        }
        store(p1_row + i, sum_g);
        store(p2_row + i, sum_gv);
        store(v_row + i, sum_v);
        if constexpr (Signs) store(signs_row + i, load<V>(signs_row + i) + sum_sign);
      });
      if constexpr (!PerPosition)
        for (int r = 0; r < R; ++r) {
          dweight[channel + r] += lane_sum<A>(weight_lanes[r]) + weight_tail[r];
          dbias[channel + r] += lane_sum<A>(bias_lanes[r]) + bias_tail[r];
        }
    });
  }

  // dx = g * rstd - a * (x - mean) - e (+ l1_scale * sign(x - mean) when Signs is set).
  template <bool Stream, bool Signs>
  [[gnu::flatten]] static void gradient_input(const Problem& problem, const Unit& unit, const T* x, const T* dy,
                                              Tile tile, Map<const A> mean, Map<const A> rstd, Map<const A> a,
                                              Map<const A> e, const A* weight, A l1_scale, T* dx) {
    const A* mean_row = mean.at(0, tile.begin);
    const A* rstd_row = rstd.at(0, tile.begin);
    const A* a_row = a.at(0, tile.begin);
    const A* e_row = e.at(0, tile.begin);
    each_row(problem, unit, tile, [&](int64_t start, int64_t channel) {
      const T* in = x + start;
      const T* grad = dy + start;
      T* out = dx + start;
      for_lanes_writing<A, Stream>(out, tile.size(), [&](auto lane, int64_t i) {
        using V = decltype(lane);
        const V centred = load<V>(in + i) - load<V>(mean_row + i);
        const int64_t at = PerPosition ? tile.begin + i : channel;
        const V scaled = affine<V>(weight + at) * load<V>(grad + i) * load<V>(rstd_row + i);
        V result = scaled - load<V>(a_row + i) * centred - load<V>(e_row + i);
        if constexpr (Signs) result += splat<V>(l1_scale) * sign(centred);
        write<Stream>(out + i, result);
      });
    });
  }

 private:
  template <class V>
  static V affine(const A* value) {
    if constexpr (PerPosition)
      return load<V>(value);
    else
      return splat<V>(*value);
  }

  template <class Body>
  static void each_row(const Problem& problem, const Unit& unit, Tile tile, Body&& body) {
    const int64_t first = unit.group * problem.group_channels();
    for (int64_t sample = unit.sample; sample < unit.sample + unit.samples; ++sample)
      for (int64_t c = first; c < first + problem.group_channels(); ++c)
        body(offset(problem, sample, c, tile.begin), c);
  }

  // body(rows, pointer to the block's first row, its first channel) for blocks of kRows channels, then single ones.
  template <class Body>
  static void each_block(const Problem& problem, const Unit& unit, const T* x, Tile tile, Body&& body) {
    const int64_t first = unit.group * problem.group_channels(), end = first + problem.group_channels();
    for (int64_t sample = unit.sample; sample < unit.sample + unit.samples; ++sample) {
      int64_t c = first;
      for (; !PerPosition && c + kRows <= end; c += kRows)
        body(std::integral_constant<int, kRows>{}, x + offset(problem, sample, c, tile.begin), c);
      for (; c < end; ++c) body(std::integral_constant<int, 1>{}, x + offset(problem, sample, c, tile.begin), c);
    }
  }
};

}  // namespace divnorm::DIVNORM_ISA
