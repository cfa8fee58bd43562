// The work on the activation itself for x of shape (batch, channels, positions), positions contiguous.
// Pixels lie in the lanes; channels stream by four at a time. One unit is one group.
#pragma once

#include <initializer_list>

#include "lanes.h"

namespace divnorm::DIVNORM_ISA {

constexpr int kRows = 4;  // channels taken at once: their loads share the maps' loads and stores

// PerPosition: the (N, F) form, whose weight and bias run along the positions of the one channel.
// Every kernel is flattened: only inlined do the sums stay in registers.
template <class T, bool PerPosition>
struct ChannelsFirst {
  using A = Acc<T>;
  using Wide = std::conditional_t<std::is_same_v<T, BFloat16> && !PerPosition, Pair, Vec<A>>;

  static int64_t offset(const Problem& problem, int64_t sample, int64_t channel, int64_t position) {
    return (sample * problem.channels + channel) * problem.positions() + position;
  }

  static int64_t parameter_place(const Problem&, int64_t i) { return i; }

  // Whether out's rows of the tile may be written with streaming stores.
  static bool streamable(const Problem& problem, const Unit& unit, const T* out, Tile tile) {
    const T* row = out + offset(problem, unit.sample, 0, tile.begin);
    const int64_t stride_bytes = problem.positions() * sizeof(T);
    return !is_pair<Wide> || (reinterpret_cast<uintptr_t>(row) | stride_bytes) % kVectorBytes == 0;
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
    each_block<kRows>(problem, unit, x, tile, [&](auto rows, const T* block, int64_t) {
      constexpr int R = rows.value;
      if (seen == 0) {
        for_lanes<Wide>(tile.size(), [&](auto lane, int64_t i) {
          using V = decltype(lane);
          V value[R], total = load<V>(block + i);
          value[0] = total;
          for (int r = 1; r < R; ++r) total += value[r] = load<V>(block + r * stride + i);
          const V average = total * splat<V>(A(1) / R);
          const V start = finite_or_zero(average);
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
        for_lanes<Wide>(tile.size(), [&](auto lane, int64_t i) {
          using V = decltype(lane);
          prefetch_next<R>(block + i, stride);
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
    for_lanes<Wide>(tile.size(), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(mean_row + i, load<V>(pivot + i) + load<V>(sum + i) * splat<V>(per_seen));
    });
    for (A* row : {mean_row, m2_row}) restore_order<Wide>(row, tile.size());
  }

  // m2 = sum of x^2: the moments of a call that subtracts no mean.
  [[gnu::flatten]] static void squares(const Problem& problem, const Unit& unit, const T* x, Tile tile, Map<A> m2) {
    A* row = m2.at(0, tile.begin);
    const int64_t stride = problem.positions();
    for (int64_t i = 0; i < tile.size(); ++i) row[i] = 0;
    each_block<kRows>(problem, unit, x, tile, [&](auto rows, const T* block, int64_t) {
      constexpr int R = rows.value;
      for_lanes<Wide>(tile.size(), [&](auto lane, int64_t i) {
        using V = decltype(lane);
        V sum = load<V>(row + i);
        for (int r = 0; r < R; ++r) {
          const V value = load<V>(block + r * stride + i);
          sum += value * value;
        }
        store(row + i, sum);
      });
    });
    restore_order<Wide>(row, tile.size());
  }

  // y = weight * (x - mean) * rstd + bias; returns the sum of |x - mean| when L1 is set.
  template <bool Stream, bool L1>
  [[gnu::flatten]] static double normalize(const Problem& problem, const Unit& unit, const T* x, Tile tile,
                                           Map<const A> mean, Map<const A> rstd, const A* weight, const A* bias, T* y) {
    const InLaneOrder<Wide, A> means(mean.at(0, tile.begin), tile.size());
    const InLaneOrder<Wide, A> scales(rstd.at(0, tile.begin), tile.size());
    const A *mean_row = means.data(), *rstd_row = scales.data(), floor = problem.template floor<A>();
    const int64_t stride = problem.positions();
    double l1 = 0;
    each_written_block<Stream>(problem, unit, x, tile, [&](auto rows, const T* block, int64_t channel) {
      constexpr int R = rows.value;
      const Affine<R> w(weight, channel, tile), b(bias, channel, tile);
      T* out = y + (block - x);
      Totals<A, 1> absolutes;
      for_lanes_writing<Wide, Stream>(out, tile.size(), [=, &absolutes](auto lane, int64_t i) {
        using V = decltype(lane);
        prefetch_next<R>(block + i, stride);
        const V average = load<V>(mean_row + i), scale = load<V>(rstd_row + i);
        for (int r = 0; r < R; ++r) {
          const V centred = load<V>(block + r * stride + i) - average;
          const V result = centred * scale * w.template at<V>(r, i) + b.template at<V>(r, i);
          write<Stream>(out + r * stride + i, rectified<V>(result, floor));
          if constexpr (L1) absolutes.add(0, absolute(centred));
        }
      });
      if constexpr (L1) l1 += absolutes.value(0);
    });
    return l1;
  }

  // p1 = sum of g, p2 = sum of g * v * rstd, v = sum of v (and signs = sum of sign(v)) over the unit's samples and
  // channels, with v = x - mean and g = weight * dy; dweight and dbias receive this tile's share. Kinks: there are l1's
  // signs or a ReLU, where dy counts only above its floor.
  template <bool Kinks>
  [[gnu::flatten]] static void gradient_sums(const Problem& problem, const Unit& unit, const T* x, const T* dy,
                                             Tile tile, Map<const A> mean, Map<const A> rstd, const A* weight,
                                             const A* bias, Map<A> p1, Map<A> p2, Map<A> v, Map<A> signs, A* dweight,
                                             A* dbias) {
    const InLaneOrder<Wide, A> means(mean.at(0, tile.begin), tile.size());
    const InLaneOrder<Wide, A> scales(rstd.at(0, tile.begin), tile.size());
    const A *mean_row = means.data(), *rstd_row = scales.data();
    A* p1_row = p1.at(0, tile.begin);
    A* p2_row = p2.at(0, tile.begin);
    A* v_row = v.at(0, tile.begin);
    const A floor = problem.template floor<A>();
    A* signs_row = Kinks ? signs.at(0, tile.begin) : nullptr;
    for (A* row : {p1_row, p2_row, v_row, signs_row})
      for (int64_t i = 0; row != nullptr && i < tile.size(); ++i) row[i] = 0;
    const int64_t stride = problem.positions();
    each_block<kRows>(problem, unit, x, tile, [&](auto rows, const T* block, int64_t channel) {
      constexpr int R = rows.value;
      const Affine<R> weights(weight, channel, tile), biases(bias, channel, tile);
      const T* dy_block = dy + (block - x);
      Totals<A, R> for_weight, for_bias;
      for_lanes<Wide>(tile.size(), [=, &for_weight, &for_bias](auto lane, int64_t i) {
        using V = decltype(lane);
        prefetch_next<R>(block + i, stride);
        prefetch_next<R>(dy_block + i, stride);
        const V average = load<V>(mean_row + i), scale = load<V>(rstd_row + i);
        V sum_g = load<V>(p1_row + i), sum_gu = load<V>(p2_row + i), sum_v = load<V>(v_row + i);
        V sum_sign = splat<V>(0);
        for (int r = 0; r < R; ++r) {
          V grad = load<V>(dy_block + r * stride + i);
          const V centred = load<V>(block + r * stride + i) - average;
          const V normed = centred * scale, w = weights.template at<V>(r, i);
          if constexpr (Kinks) grad = passed(grad, V(normed * w + biases.template at<V>(r, i)), floor);
          const V product = grad * normed;
          sum_g += w * grad;
          sum_gu += w * product;
          sum_v += centred;
          if constexpr (Kinks) sum_sign += sign(centred);
          if constexpr (PerPosition) {
            const int64_t at = tile.begin + i;
            store(dweight + at, load<V>(dweight + at) + product);
            store(dbias + at, load<V>(dbias + at) + grad);
          } else {
            for_weight.add(r, product);
            for_bias.add(r, grad);
          }
        }
        store(p1_row + i, sum_g);
        store(p2_row + i, sum_gu);
        store(v_row + i, sum_v);
        if constexpr (Kinks) store(signs_row + i, load<V>(signs_row + i) + sum_sign);
      });
      if constexpr (!PerPosition)
        for (int r = 0; r < R; ++r) {
          dweight[channel + r] += for_weight.value(r);
          dbias[channel + r] += for_bias.value(r);
        }
    });
    for (A* row : {p1_row, p2_row, v_row, signs_row})
      if (row != nullptr) restore_order<Wide>(row, tile.size());
  }

  // dx = g * rstd - a * (x - mean) - e (+ l1_scale * sign(x - mean) with Kinks). Not Suppressed: rstd is 1 and a is 0
  // whatever x is, be it a NaN.
  template <bool Stream, bool Kinks, bool Suppressed>
  [[gnu::flatten]] static void gradient_input(const Problem& problem, const Unit& unit, const T* x, const T* dy,
                                              Tile tile, Map<const A> mean, Map<const A> rstd, Map<const A> a,
                                              Map<const A> e, const A* weight, const A* bias, A l1_scale, T* dx) {
    const InLaneOrder<Wide, A> means(mean.at(0, tile.begin), tile.size());
    const InLaneOrder<Wide, A> scales(rstd.at(0, tile.begin), tile.size());
    const InLaneOrder<Wide, A> slopes(a.at(0, tile.begin), tile.size());
    const InLaneOrder<Wide, A> shifts(e.at(0, tile.begin), tile.size());
    const A *mean_row = means.data(), *rstd_row = scales.data();
    const A *a_row = slopes.data(), *e_row = shifts.data(), floor = problem.template floor<A>();
    const int64_t stride = problem.positions();
    each_written_block<Stream>(problem, unit, x, tile, [&](auto rows, const T* block, int64_t channel) {
      constexpr int R = rows.value;
      const Affine<R> w(weight, channel, tile), b(bias, channel, tile);
      const T* dy_block = dy + (block - x);
      T* out = dx + (block - x);
      for_lanes_writing<Wide, Stream>(out, tile.size(), [=](auto lane, int64_t i) {
        using V = decltype(lane);
        prefetch_next<R>(block + i, stride);
        prefetch_next<R>(dy_block + i, stride);
        const V average = load<V>(mean_row + i), scale = load<V>(rstd_row + i);
        const V slope = load<V>(a_row + i), shift = load<V>(e_row + i);
        for (int r = 0; r < R; ++r) {
          const V centred = load<V>(block + r * stride + i) - average;
          V grad = load<V>(dy_block + r * stride + i);
          if constexpr (Kinks) {
            const V result = centred * scale * w.template at<V>(r, i) + b.template at<V>(r, i);
            grad = passed(grad, result, floor);
          }
          V result = w.template at<V>(r, i) * grad * scale;
          if constexpr (Suppressed) result -= slope * centred;
          result -= shift;
          if constexpr (Kinks) result += splat<V>(l1_scale) * sign(centred);
          write<Stream>(out + r * stride + i, result);
        }
      });
    });
  }

 private:
  // The weights (or biases) of a block: one number per row, or in the (N, F) form one per position. Copied out of the
  // parameter's memory, which for all the compiler knows each store could change.
  template <int R>
  class Affine {
   public:
    Affine(const A* values, int64_t channel, Tile tile) : along_(values + tile.begin) {
      for (int r = 0; r < R; ++r) rows_[r] = PerPosition ? A(0) : values[channel + r];
    }
    template <class V>
    V at(int r, int64_t i) const {
      if constexpr (PerPosition)
        return load<V>(along_ + i);
      else
        return splat<V>(rows_[r]);
    }

   private:
    const A* along_;
    A rows_[R];
  };

  // body(rows, pointer to the block's first row, its first channel) for blocks of Rows channels, then single ones.
  template <int Rows, class Body>
  static void each_block(const Problem& problem, const Unit& unit, const T* x, Tile tile, Body&& body) {
    const int64_t first = unit.group * problem.group_channels(), end = first + problem.group_channels();
    for (int64_t sample = unit.sample; sample < unit.sample + unit.samples; ++sample) {
      int64_t c = first;
      for (; !PerPosition && c + Rows <= end; c += Rows)
        body(std::integral_constant<int, Rows>{}, x + offset(problem, sample, c, tile.begin), c);
      for (; c < end; ++c) body(std::integral_constant<int, 1>{}, x + offset(problem, sample, c, tile.begin), c);
    }
  }

  // Streaming stores fill whole cache lines one after the other, so they take one row at a time.
  template <bool Stream, class Body>
  static void each_written_block(const Problem& problem, const Unit& unit, const T* x, Tile tile, Body&& body) {
    each_block<Stream ? 1 : kRows>(problem, unit, x, tile, body);
  }
};

}  // namespace divnorm::DIVNORM_ISA
