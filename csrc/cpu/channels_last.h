// The work on the activation itself for x of shape (batch, positions, channels), channels contiguous.
// Channels lie in the lanes; pixels come four at a time. One unit holds all groups, since a pixel's groups share its
// cache lines.
#pragma once

#include "smooth.h"

namespace divnorm::DIVNORM_ISA {

constexpr int kPixels = 4;  // taken at once: they share loads of per-channel numbers and the summing of lanes

template <class T>
struct ChannelsLast {
  using A = Acc<T>;
  using Wide = std::conditional_t<std::is_same_v<T, BFloat16>, Pair, Vec<A>>;

  static constexpr bool kMayStream = kStreams<T>;

  static int64_t offset(const Problem& problem, int64_t sample, int64_t channel, int64_t position) {
    return (sample * problem.positions() + position) * problem.channels + channel;
  }

  // Where the kernels find a channel's weight, bias and their gradients.
  static int64_t parameter_place(const Problem& problem, int64_t channel) {
    const int64_t n = problem.group_channels();
    return channel / n * n + lane_place<Wide>(channel % n, n);
  }

  // Of numbers that SmoothRows makes.
  static int64_t longest_row(const Problem& problem, const Traversal&) { return problem.group_channels(); }

  static bool streamable(const Problem& problem, const Unit&, const T* out, Tile) {
    const int64_t group_bytes = problem.group_channels() * sizeof(T);
    return !is_pair<Wide> || (reinterpret_cast<uintptr_t>(out) | group_bytes) % kVectorBytes == 0;
  }

  // As ChannelsFirst::moments. A pixel's channels are in the nearest cache after the first look, so the sum of
  // (x - mean)^2 is a second look at them; it also gives the mean's own rounding error, which is then added to it.
  [[gnu::flatten]] static void moments(const Problem& problem, const Unit& unit, const T* x, Tile tile, Map<A> mean,
                                       Map<A> m2) {
    const int64_t n = problem.group_channels(), stride = problem.channels;
    const A per_channel = A(1) / n;
    each_block<kPixels>(problem, unit, x, tile, [&](auto pixels, const T* in, int64_t position, Segment at) {
      constexpr int R = pixels.value;
      Totals<A, R> total;
      for_lanes<Wide>(n, [=, &total](auto lane, int64_t i) {
        prefetch_next<R>(in + i, stride);
        for (int r = 0; r < R; ++r) total.add(r, load<decltype(lane)>(in + r * stride + i));
      });
      A average[R], error[R], squares[R];
      total.values(average);
      for (int r = 0; r < R; ++r) average[r] *= per_channel;
      Totals<A, R> first, second;
      for_lanes<Wide>(n, [=, &first, &second](auto lane, int64_t i) {
        using V = decltype(lane);
        for (int r = 0; r < R; ++r) {
          const V centred = load<V>(in + r * stride + i) - splat<V>(average[r]);
          first.add(r, centred);
          second.add(r, centred * centred);
        }
      });
      first.values(error);
      second.values(squares);
      A* mean_out = mean.at(at.group, position);
      A* m2_out = m2.at(at.group, position);
      for (int r = 0; r < R; ++r) {
        const A step = error[r] * per_channel;
        const A own_mean = step - step == 0 ? average[r] + step : average[r];
        merge(own_mean, squares[r] - error[r] * step, n, at.seen, mean_out[r], m2_out[r]);
      }
    });
  }

  [[gnu::flatten]] static void squares(const Problem& problem, const Unit& unit, const T* x, Tile tile, Map<A> m2) {
    const int64_t n = problem.group_channels(), stride = problem.channels;
    each_block<kPixels>(problem, unit, x, tile, [&](auto pixels, const T* in, int64_t position, Segment at) {
      constexpr int R = pixels.value;
      Totals<A, R> total;
      for_lanes<Wide>(n, [=, &total](auto lane, int64_t i) {
        for (int r = 0; r < R; ++r) {
          const auto value = load<decltype(lane)>(in + r * stride + i);
          total.add(r, value * value);
        }
      });
      accumulate(total, at, m2, position);
    });
  }

  [[gnu::flatten]] static void absolutes(const Problem& problem, const Unit& unit, const T* x, Tile tile,
                                         Map<const A> mean, Map<A> sums) {
    const int64_t n = problem.group_channels(), stride = problem.channels;
    each_block<kPixels>(problem, unit, x, tile, [&](auto pixels, const T* in, int64_t position, Segment at) {
      constexpr int R = pixels.value;
      const Copy<R> average(mean, at, position);
      Totals<A, R> total;
      for_lanes<Wide>(n, [=, &total](auto lane, int64_t i) {
        using V = decltype(lane);
        for (int r = 0; r < R; ++r) total.add(r, absolute(load<V>(in + r * stride + i) - splat<V>(average[r])));
      });
      accumulate(total, at, sums, position);
    });
  }

  template <bool Stream, bool L1, class Epilogue>
  [[gnu::flatten]] static double normalize(const Problem& problem, const Unit& unit, const T* x, Tile tile,
                                           Map<const A> mean, Map<const A> offset, Map<const A> rstd, const A* weight,
                                           const A* bias, Epilogue epilogue, T* y) {
    const int64_t n = problem.group_channels(), stride = problem.channels;
    double l1 = 0;
    each_written_block<Stream>(problem, unit, x, tile, [&](auto pixels, const T* in, int64_t position, Segment at) {
      constexpr int R = pixels.value;
      const Copy<R> average(mean, at, position), centre(offset, at, position), scale(rstd, at, position);
      const A *w = weight + at.channel, *b = bias + at.channel;
      const auto behind = epilogue.template rows<R, true>(in - x, stride, at.channel);
      T* out = y + (in - x);
      Totals<A, 1> absolutes;
      for_lanes_writing<Wide, Stream>(out, n, [=, &absolutes](auto lane, int64_t i) {
        using V = decltype(lane);
        const V weights = load<V>(w + i), biases = load<V>(b + i);
        for (int r = 0; r < R; ++r) {
          const V number = load<V>(in + r * stride + i), top = number - splat<V>(centre[r]);
          const V z = top * splat<V>(scale[r]) * weights + biases;
          write<Stream>(out + r * stride + i, behind.template value<V>(z, r, i));
          if constexpr (L1) absolutes.add(0, absolute(number - splat<V>(average[r])));
        }
      });
      if constexpr (L1) l1 += absolutes.value(0);
    });
    return l1;
  }

  // The same where the epilogue is a smooth activation.
  template <bool Stream, bool L1>
  [[gnu::flatten]] static double normalize(const Problem& problem, const Unit& unit, const T* x, Tile tile,
                                           Map<const A> mean, Map<const A> offset, Map<const A> rstd, const A* weight,
                                           const A* bias, SmoothRows<T, Wide> behind, T* y) {
    const int64_t n = problem.group_channels(), stride = problem.channels;
    double l1 = 0;
    for (int64_t seen = 0; seen < unit.samples; ++seen)
      for (int64_t position = tile.begin, rows; position < tile.end; position += rows) {
        rows = behind.room(n, tile.end - position);
        for (int64_t group = 0; group < problem.groups; ++group) {
          const int64_t c = group * n, at = ChannelsLast::offset(problem, unit.sample + seen, c, position);
          const auto each = lane_places<Wide, Stream>(y + at, stride, n);
          const A* values = behind.values(
              at, rows, stride, n, each,
              normal_rows(x + at, stride, offset.at(group, position), rstd.at(group, position), weight + c, bias + c));
          const A* average = mean.at(group, position);
          Totals<A, 1> absolutes;
          for (int64_t r = 0; r < rows; ++r)
            each(r, [=, &absolutes](auto lane, int64_t place, int64_t i, auto) {
              using V = decltype(lane);
              write<Stream>(y + at + r * stride + i, load<V>(values + r * behind.width(n) + place));
              if constexpr (L1) absolutes.add(0, absolute(load<V>(x + at + r * stride + i) - splat<V>(average[r])));
            });
          if constexpr (L1) l1 += absolutes.value(0);
        }
      }
    return l1;
  }

  template <Kinks K, class Epilogue, bool Sloped>
  [[gnu::flatten]] static void gradient_sums(const Problem& problem, const Unit& unit, const T* x,
                                             Gradients<T, Wide, Sloped> dy, Tile tile, Map<const A> mean,
                                             Map<const A> offset, Map<const A> rstd, const A* weight, const A* bias,
                                             Epilogue epilogue, Map<A> p1, Map<A> p2, Map<A> v, Map<A> signs,
                                             A* dweight, A* dbias, A* dthreshold) {
    constexpr bool kSigns = K == Kinks::signs;
    const int64_t n = problem.group_channels(), stride = problem.channels;
    each_block<kPixels>(problem, unit, x, tile, [&](auto pixels, const T* in, int64_t position, Segment at) {
      constexpr int R = pixels.value;
      const Copy<R> average(mean, at, position), scale(rstd, at, position);
      const Copy<R> centre(kSigns ? offset : mean, at, position);
      const A *w = weight + at.channel, *b = bias + at.channel;
      const auto grads = dy.template rows<false>(
          in - x, R, problem.groups == 1 ? tile.end - position : R, stride, n, lane_places<Wide, false>(in, stride, n),
          normal_rows(in, stride, offset.at(at.group, position), rstd.at(at.group, position), w, b));
      const T* given = dy.given() + (in - x);
      const auto behind = epilogue.template rows<R, true>(in - x, stride, at.channel);
      A *dw = dweight + at.channel, *db = dbias + at.channel;
      A* dt = dthreshold == nullptr ? nullptr : dthreshold + at.channel;
      Totals<A, R> sum_g, sum_gu, sum_v, sum_sign;
      for_lanes<Wide>(n, [=, &sum_g, &sum_gu, &sum_v, &sum_sign](auto lane, int64_t i) {
        using V = decltype(lane);
        prefetch_next<R>(in + i, stride);
        prefetch_next<R>(given + i, stride);
        const V weights = load<V>(w + i);
        V for_weight = load<V>(dw + i), for_bias = load<V>(db + i), for_threshold = splat<V>(0);
        if (Epilogue::kStops && dt != nullptr) for_threshold = load<V>(dt + i);
        for (int r = 0; r < R; ++r) {
          V grad = load<V>(grads.row(r) + i);
          const V number = load<V>(in + r * stride + i), centred = number - splat<V>(average[r]);
          const V normed = (kSigns ? number - splat<V>(centre[r]) : centred) * splat<V>(scale[r]);
          if constexpr (K != Kinks::none) {
            const V z = normed * weights + load<V>(b + i);
            if constexpr (Epilogue::kStops) for_threshold += behind.template stopped<V>(grad, z, r, i);
            grad = behind.template gradient<V>(grad, z, r, i);
          }
          const V product = grad * normed;
          sum_g.add(r, weights * grad);
          sum_gu.add(r, weights * product);
          sum_v.add(r, centred);
          if constexpr (kSigns) sum_sign.add(r, sign(centred));
          for_weight += product;
          for_bias += grad;
        }
        store(dw + i, for_weight);
        store(db + i, for_bias);
        if (Epilogue::kStops && dt != nullptr) store(dt + i, for_threshold);
      });
      accumulate(sum_g, at, p1, position);
      accumulate(sum_gu, at, p2, position);
      accumulate(sum_v, at, v, position);
      if constexpr (kSigns) accumulate(sum_sign, at, signs, position);
    });
  }

  template <bool Stream, Kinks K, int P, class Epilogue, bool Sloped>
  [[gnu::flatten]] static void gradient_input(const Problem& problem, const Unit& unit, const T* x,
                                              Gradients<T, Wide, Sloped> dy, Tile tile, Map<const A> mean,
                                              Map<const A> offset, Map<const A> rstd, Map<const A> a, Map<const A> e,
                                              const A* weight, const A* bias, Epilogue epilogue, A l1_scale, T* dx) {
    constexpr bool kSigns = K == Kinks::signs;
    const int64_t n = problem.group_channels(), stride = problem.channels;
    each_written_block<Stream>(problem, unit, x, tile, [&](auto pixels, const T* in, int64_t position, Segment at) {
      constexpr int R = pixels.value;
      const Copy<R> average(mean, at, position), scale(rstd, at, position);
      const Copy<R> slope(a, at, position), shift(e, at, position), centre(kSigns ? offset : mean, at, position);
      const A *w = weight + at.channel, *b = bias + at.channel;
      const auto behind = epilogue.template rows<R, true>(in - x, stride, at.channel);
      T* out = dx + (in - x);
      const auto grads = dy.template rows<Stream>(
          in - x, R, problem.groups == 1 ? tile.end - position : R, stride, n,
          lane_places<Wide, Stream>(out, stride, n),
          normal_rows(in, stride, offset.at(at.group, position), rstd.at(at.group, position), w, b));
      for_lanes_writing<Wide, Stream>(out, n, [=](auto lane, int64_t i) {
        using V = decltype(lane);
        const auto normal = [=](int r, int64_t i) {
          const V top = load<V>(in + r * stride + i) - splat<V>(centre[r]);
          return top * splat<V>(scale[r]) * load<V>(w + i) + load<V>(b + i);
        };
        const V weights = load<V>(w + i);
        for (int r = 0; r < R; ++r) {
          const V centred = load<V>(in + r * stride + i) - splat<V>(average[r]);
          V grad = load<V>(grads.row(r) + i);
          if constexpr (K != Kinks::none) {
            grad = behind.template gradient<V>(grad, normal(r, i), r, i);
            behind.template keep<Stream>(grad, r, i);
          }
          V result = weights * grad * splat<V>(scale[r]);
          if constexpr (P == 2) result -= splat<V>(slope[r]) * centred;
          result -= splat<V>(shift[r]);
          if constexpr (kSigns) result += splat<V>(P == 1 ? l1_scale - slope[r] : l1_scale) * sign(centred);
          write<Stream>(out + r * stride + i, result);
        }
      });
    });
  }

 private:
  // The numbers that an epilogue is given of a group's channels, of pixels from `in` on.
  static auto normal_rows(const T* in, int64_t stride, const A* centre, const A* scale, const A* weight,
                          const A* bias) {
    return [=](auto lane, int64_t r, int64_t, int64_t i, auto) {
      using V = decltype(lane);
      const V top = load<V>(in + r * stride + i) - splat<V>(centre[r]);
      return V(top * splat<V>(scale[r]) * load<V>(weight + i) + load<V>(bias + i));
    };
  }

  // Where in its pixels a block is: its group, that group's first channel, and how many samples came before.
  struct Segment {
    int64_t group, channel, seen;
  };

  // A map's numbers for the pixels of a block, out of memory that stores could change.
  template <int R>
  class Copy {
   public:
    Copy(Map<const A> map, Segment at, int64_t position) {
      for (int r = 0; r < R; ++r) numbers_[r] = *map.at(at.group, position + r);
    }
    A operator[](int r) const { return numbers_[r]; }

   private:
    A numbers_[R];
  };

  // Joins the moments of another sample's n channels to those of `seen` samples (Chan et al. 1983).
  static void merge(A own_mean, A own_m2, int64_t n, int64_t seen, A& mean, A& m2) {
    if (seen == 0) {
      mean = own_mean;
      m2 = own_m2;
      return;
    }
    const A step = own_mean - mean, share = A(1) / (seen + 1);
    mean = step - step == 0 ? mean + step * share : mean + own_mean;
    m2 += own_m2 + step * step * (n * seen * share);
  }

  template <int R>
  static void accumulate(const Totals<A, R>& totals, Segment at, Map<A> map, int64_t position) {
    A sums[R];
    totals.values(sums);
    A* out = map.at(at.group, position);
    for (int r = 0; r < R; ++r) out[r] = (at.seen == 0 ? 0 : out[r]) + sums[r];
  }

  // body(pixels, pointer to the group's first channel of the first pixel, its position, where that is) for blocks of R
  // pixels, then single ones.
  template <int R, class Body>
  static void each_block(const Problem& problem, const Unit& unit, const T* x, Tile tile, Body&& body) {
    const int64_t n = problem.group_channels();
    const auto each_group = [&](auto pixels, int64_t seen, int64_t position) {
      const T* in = x + offset(problem, unit.sample + seen, 0, position);
      for (int64_t group = 0; group < problem.groups; ++group)
        body(pixels, in + group * n, position, Segment{group, group * n, seen});
    };
    for (int64_t seen = 0; seen < unit.samples; ++seen) {
      int64_t position = tile.begin;
      for (; position + R <= tile.end; position += R) each_group(std::integral_constant<int, R>{}, seen, position);
      for (; position < tile.end; ++position) each_group(std::integral_constant<int, 1>{}, seen, position);
    }
  }

  // Streaming stores fill whole cache lines one after the other, so they take one pixel at a time.
  template <bool Stream, class Body>
  static void each_written_block(const Problem& problem, const Unit& unit, const T* x, Tile tile, Body&& body) {
    each_block<Stream ? 1 : kPixels>(problem, unit, x, tile, body);
  }
};

}  // namespace divnorm::DIVNORM_ISA
