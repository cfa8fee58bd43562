// The work on the activation itself for x of shape (batch, channels, positions), positions contiguous.
// Pixels lie in the lanes; channels stream by four at a time. One unit is one group.
#pragma once

#include "channels_first_sums.h"
#include "smooth.h"

namespace divnorm::DIVNORM_ISA {

constexpr int kRows = 4;  // channels taken at once: their loads share the maps' loads and stores

// PerPosition: the (N, F) form, whose weight and bias run along the positions of the one channel.
// Every kernel is flattened: only inlined do the sums stay in registers.
template <class T, bool PerPosition>
struct ChannelsFirst : ChannelsFirstSums<T, PerPosition> {
  using Sums = ChannelsFirstSums<T, PerPosition>;
  using Sums::offset;
  using typename Sums::A;
  using typename Sums::Wide;

  static constexpr bool kMayStream = kStreams<T> && !PerPosition;

  static int64_t parameter_place(const Problem&, int64_t i) { return i; }
  // Of numbers that SmoothRows makes.
  static int64_t longest_row(const Problem&, const Traversal& t) { return t.tile; }

  // Whether out's rows of the tile may be written with streaming stores.
  static bool streamable(const Problem& problem, const Unit& unit, const T* out, Tile tile) {
    const T* row = out + offset(problem, unit.sample, 0, tile.begin);
    const int64_t stride_bytes = problem.positions() * sizeof(T), tile_bytes = tile.size() * sizeof(T);
    return !is_pair<Wide> || (reinterpret_cast<uintptr_t>(row) | stride_bytes | tile_bytes) % kVectorBytes == 0;
  }

  // y = epilogue(weight * (x - offset) * rstd + bias); returns the sum of |x - mean| when L1 is set.
  template <bool Stream, bool L1, class Epilogue>
  [[gnu::flatten]] static double normalize(const Problem& problem, const Unit& unit, const T* x, Tile tile,
                                           Map<const A> mean, Map<const A> offset, Map<const A> rstd, const A* weight,
                                           const A* bias, Epilogue epilogue, T* y) {
    const int64_t stride = problem.positions();
    double l1 = 0;
    with_widest<Wide, Stream>(tile.size(), [&](auto widest) {
      using Widest = decltype(widest);
      const InSlots<Widest, Stream, A> offsets(offset.at(0, tile.begin), tile.size());
      const InSlots<Widest, Stream, A> scales(rstd.at(0, tile.begin), tile.size());
      const InSlotsIf<L1, Widest, Stream, A> means(mean.at(0, tile.begin), tile.size());
      const A *offset_row = offsets.data(), *rstd_row = scales.data(), *mean_row = means.data();
      each_written_block<Stream>(problem, unit, x, tile, [&](auto rows, const T* block, int64_t channel) {
        constexpr int R = rows.value;
        const Affine<R> w(weight, channel, tile), b(bias, channel, tile);
        const auto behind = behind_rows<R>(epilogue, block - x, stride, channel, tile);
        T* out = y + (block - x);
        Totals<A, 1> absolutes;
        const auto body = [=, &absolutes](auto lane, auto slots, int64_t at, int64_t from, auto again) {
          using V = decltype(lane);
          constexpr int S = slots.value;
          V centre[S], scale[S];
          load_slots(offset_row + at, centre);
          load_slots(rstd_row + at, scale);
          for (int r = 0; r < R; ++r)
            for (int s = 0; s < S; ++s) {
              const int64_t i = from + s * kWidth<V>;
              const V number = load<V>(block + r * stride + i), below = centre[s] - number;
              const V result = b.template at<V>(r, i) - below * scale[s] * w.template at<V>(r, i);
              write<Stream>(out + r * stride + i, behind.template value<V>(result, r, i));
              if constexpr (L1)
                absolutes.add(0, only_new(absolute(load<V>(mean_row + at + s * kWidth<V>) - number), again));
            }
        };
        for_slots_writing<Widest, Stream>(out, tile.size(), body);
        if constexpr (L1) l1 += absolutes.value(0);
      });
    });
    return l1;
  }

  // The same where the epilogue is a smooth activation.
  template <bool Stream, bool L1>
  [[gnu::flatten]] static double normalize(const Problem& problem, const Unit& unit, const T* x, Tile tile,
                                           Map<const A> mean, Map<const A> offset, Map<const A> rstd, const A* weight,
                                           const A* bias, SmoothRows<T, Wide> behind, T* y) {
    const int64_t stride = problem.positions(), count = tile.size();
    const int64_t first = unit.group * problem.group_channels(), end = first + problem.group_channels();
    const int64_t width = behind.width(count);
    double l1 = 0;
    with_widest<Wide, Stream>(count, [&](auto widest) {
      using V = decltype(widest);
      const InSlots<V, Stream, A> offsets(offset.at(0, tile.begin), count), scales(rstd.at(0, tile.begin), count);
      const InSlotsIf<L1, V, Stream, A> means(mean.at(0, tile.begin), count);
      const A* mean_row = means.data();
      for (int64_t sample = unit.sample; sample < unit.sample + unit.samples; ++sample)
        for (int64_t c = first, rows; c < end; c += rows) {
          rows = behind.room(count, end - c);
          const int64_t at = Sums::offset(problem, sample, c, tile.begin);
          const auto each = row_places<V, Stream>(y + at, stride, count);
          const A* values =
              behind.values(at, rows, stride, count, each,
                            normal_rows(x + at, stride, offsets.data(), scales.data(), weight, bias, c, tile));
          Totals<A, 1> absolutes;
          for (int64_t r = 0; r < rows; ++r)
            each(r, [=, &absolutes](auto lane, int64_t place, int64_t from, auto again) {
              using V = decltype(lane);
              write<Stream>(y + at + r * stride + from, load<V>(values + r * width + place));
              if constexpr (L1) {
                const V number = load<V>(x + at + r * stride + from);
                absolutes.add(0, only_new(absolute(load<V>(mean_row + place) - number), again));
              }
            });
          if constexpr (L1) l1 += absolutes.value(0);
        }
    });
    return l1;
  }

  // p1 = sum of g, p2 = sum of g * (x - offset) * rstd, v = sum of v (and signs = sum of sign(v)) over the unit's
  // samples and channels, with v = x - mean and g = weight * dy; dweight, dbias and where the epilogue stops dy
  // dthreshold receive this tile's share. x is subtracted from the mean, an instruction less than the other way round.
  template <Kinks K, class Epilogue, bool Sloped>
  [[gnu::flatten]] static void gradient_sums(const Problem& problem, const Unit& unit, const T* x,
                                             Gradients<T, Wide, Sloped> dy, Tile tile, Map<const A> mean,
                                             Map<const A> offset, Map<const A> rstd, const A* weight, const A* bias,
                                             Epilogue epilogue, Map<A> p1, Map<A> p2, Map<A> v, Map<A> signs,
                                             A* dweight, A* dbias, A* dthreshold) {
    constexpr bool kSigns = K == Kinks::signs;
    const int64_t stride = problem.positions();
    with_widest<Wide>(tile.size(), [&](auto widest) {
      using V = decltype(widest);
      const InSlots<V, false, A> means(mean.at(0, tile.begin), tile.size());
      const InSlots<V, false, A> scales(rstd.at(0, tile.begin), tile.size());
      const InSlotsIf<kSigns, V, false, A> offsets(offset.at(0, tile.begin), tile.size());
      const A *mean_row = means.data(), *rstd_row = scales.data(), *offset_row = kSigns ? offsets.data() : mean_row;
      alignas(kVectorBytes) A copies[kSigns ? 4 : 3][kCopyNumbers<A>];
      // A single row needs no copies where its slots are those of the maps.
      const bool copied = !PerPosition || tile.size() % kWidth<V> != 0;
      A* sums_g = copied ? copies[0] : p1.at(0, tile.begin);
      A* sums_gv = copied ? copies[1] : p2.at(0, tile.begin);
      A* sums_v = copied ? copies[2] : v.at(0, tile.begin);
      A* sums_sign = !kSigns ? nullptr : copied ? copies[kSigns ? 3 : 0] : signs.at(0, tile.begin);
      for_each_slot<V>(tile.size(), [&](int64_t at, int64_t, auto) {
        for (A* row : {sums_g, sums_gv, sums_v}) store(row + at, splat<V>(0));
        if constexpr (kSigns) store(sums_sign + at, splat<V>(0));
      });
      each_block<kRows>(problem, unit, x, tile, [&](auto rows, const T* block, int64_t channel) {
        constexpr int R = rows.value;
        const Affine<R> weights(weight, channel, tile), biases(bias, channel, tile);
        const auto behind = behind_rows<R>(epilogue, block - x, stride, channel, tile);
        const auto grads = dy.template rows<false>(
            block - x, R, R, stride, tile.size(), row_places<V, false>(block, stride, tile.size()),
            normal_rows(block, stride, offset_row, rstd_row, weight, bias, channel, tile));
        // Whole planes lie one after the other: the next rows come as one run.
        const int64_t next = tile.size() == stride ? R * stride : 0, pace = tile.size() == stride ? R : 1;
        RowSum<V> for_weight[R] = {}, for_bias[R] = {}, for_threshold[R] = {};
        for_each_slot<V>(tile.size(), [&](int64_t at, int64_t from, auto again) {
          if constexpr (!PerPosition)
            for (const T* rows_ahead : {block + next, dy.given() + (block - x) + next})
              prefetch_lines<R * kWidth<V> * sizeof(T)>(rows_ahead + pace * from);
          const V average = load<V>(mean_row + at), scale = load<V>(rstd_row + at);
          V sum_g = load<V>(sums_g + at), sum_gv = load<V>(sums_gv + at), sum_v = load<V>(sums_v + at);
          V sum_sign = splat<V>(0);
          const auto normal = [&](int r) {
            const V top = load<V>(offset_row + at) - load<V>(block + r * stride + from);
            return biases.template at<V>(r, from) - top * scale * weights.template at<V>(r, from);
          };
          for (int r = 0; r < R; ++r) {
            V grad = load<V>(grads.row(r) + grads.place(at, from));
            const V number = load<V>(block + r * stride + from), w = weights.template at<V>(r, from);
            const V below = average - number;
            V top = below;  // the numerator's, of which dy's gradients are made
            if constexpr (kSigns) top = load<V>(offset_row + at) - number;
            if constexpr (K != Kinks::none) {
              if constexpr (Epilogue::kStops) {
                const V rest = behind.template stopped<V>(grad, normal(r), r, from);
                if constexpr (!PerPosition)
                  add_to(for_threshold[r], only_new(rest, again));
                else if (dthreshold != nullptr)
                  add_at<V>(dthreshold + tile.begin + from, only_new(rest, again));
              }
              grad = behind.template gradient<V>(grad, normal(r), r, from);
            }
            const V product = grad * top;
            sum_g += w * grad;
            sum_gv -= w * product;
            sum_v -= below;
            if constexpr (kSigns) sum_sign -= sign(below);
            if constexpr (PerPosition) {
              const int64_t place = tile.begin + from;
              store(dweight + place, load<V>(dweight + place) - only_new(V(product * scale), again));
              add_at<V>(dbias + place, only_new(grad, again));
            } else {
              subtract_product(for_weight[r], only_new(product, again), scale);
              add_to(for_bias[r], only_new(grad, again));
            }
          }
          store(sums_g + at, sum_g);
          store(sums_gv + at, sum_gv);
          store(sums_v + at, sum_v);
          if constexpr (kSigns) store(sums_sign + at, load<V>(sums_sign + at) + sum_sign);
        });
        if constexpr (!PerPosition) {
          add_row_sums(for_weight, dweight + channel);
          add_row_sums(for_bias, dbias + channel);
          if constexpr (Epilogue::kStops)
            if (dthreshold != nullptr) add_row_sums(for_threshold, dthreshold + channel);
        }
      });
      for_each_slot<V>(tile.size(), [&](int64_t at, int64_t, auto) {
        store(sums_gv + at, load<V>(sums_gv + at) * load<V>(rstd_row + at));
      });
      if (!copied) return;
      put_slots<V>(sums_g, tile.size(), p1.at(0, tile.begin));
      put_slots<V>(sums_gv, tile.size(), p2.at(0, tile.begin));
      put_slots<V>(sums_v, tile.size(), v.at(0, tile.begin));
      if constexpr (kSigns) put_slots<V>(sums_sign, tile.size(), signs.at(0, tile.begin));
    });
  }

  // dx = g * rstd - a * v - e (+ l1_scale * sign(v) with signs), for P = 1 with sign(v) in place of v.
  template <bool Stream, Kinks K, int P, class Epilogue, bool Sloped>
  [[gnu::flatten]] static void gradient_input(const Problem& problem, const Unit& unit, const T* x,
                                              Gradients<T, Wide, Sloped> dy, Tile tile, Map<const A> mean,
                                              Map<const A> offset, Map<const A> rstd, Map<const A> a, Map<const A> e,
                                              const A* weight, const A* bias, Epilogue epilogue, A l1_scale, T* dx) {
    constexpr bool kSigns = K == Kinks::signs;
    const int64_t stride = problem.positions();
    with_widest<Wide, Stream>(tile.size(), [&](auto widest) {
      using Widest = decltype(widest);
      const InSlots<Widest, Stream, A> means(mean.at(0, tile.begin), tile.size());
      const InSlots<Widest, Stream, A> scales(rstd.at(0, tile.begin), tile.size());
      const InSlots<Widest, Stream, A> slopes(a.at(0, tile.begin), tile.size());
      const InSlots<Widest, Stream, A> shifts(e.at(0, tile.begin), tile.size());
      const InSlotsIf<kSigns, Widest, Stream, A> offsets(offset.at(0, tile.begin), tile.size());
      const A *mean_row = means.data(), *rstd_row = scales.data(), *a_row = slopes.data(), *e_row = shifts.data();
      const A* offset_row = kSigns ? offsets.data() : mean_row;
      each_written_block<Stream>(problem, unit, x, tile, [&](auto rows, const T* block, int64_t channel) {
        constexpr int R = rows.value;
        const Affine<R> w(weight, channel, tile), b(bias, channel, tile);
        const auto behind = behind_rows<R>(epilogue, block - x, stride, channel, tile);
        T* out = dx + (block - x);
        const auto grads = dy.template rows<Stream>(
            block - x, R, R, stride, tile.size(), row_places<Widest, Stream>(out, stride, tile.size()),
            normal_rows(block, stride, offset_row, rstd_row, weight, bias, channel, tile));
        const auto body = [=](auto lane, auto slots, int64_t at, int64_t from, auto) {
          using V = decltype(lane);
          constexpr int S = slots.value;
          V average[S], scale[S], slope[S], shift[S];
          load_slots(mean_row + at, average);
          load_slots(rstd_row + at, scale);
          load_slots(a_row + at, slope);
          load_slots(e_row + at, shift);
          const auto normal = [&](int r, int s, int64_t i) {
            const V top = load<V>(offset_row + at + s * kWidth<V>) - load<V>(block + r * stride + i);
            return b.template at<V>(r, i) - top * scale[s] * w.template at<V>(r, i);
          };
          for (int r = 0; r < R; ++r)
            for (int s = 0; s < S; ++s) {
              const int64_t i = from + s * kWidth<V>;
              const V number = load<V>(block + r * stride + i), below = average[s] - number;
              V grad = load<V>(grads.row(r) + grads.place(at, from) + s * kWidth<V>);
              if constexpr (K != Kinks::none) {
                grad = behind.template gradient<V>(grad, normal(r, s, i), r, i);
                behind.template keep<Stream>(grad, r, i);
              }
              V result = w.template at<V>(r, i) * grad * scale[s] - shift[s];
              if constexpr (P == 2) result += slope[s] * below;
              if constexpr (kSigns)
                result += (P == 1 ? slope[s] - splat<V>(l1_scale) : splat<V>(-l1_scale)) * sign(below);
              write<Stream>(out + r * stride + i, result);
            }
        };
        for_slots_writing<Widest, Stream>(out, tile.size(), body);
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

  // The places of rows that are written to `out`.
  template <class V, bool Stream>
  static auto row_places(const T* out, int64_t stride, int64_t count) {
    if constexpr (Stream)
      return lane_places<V, true>(out, stride, count);
    else
      return [=](int64_t, auto&& body) {
        for_each_slot<V>(count, [&](int64_t at, int64_t from, auto again) { body(V{}, at, from, again); });
      };
  }

  // The numbers that an epilogue is given of rows from `block` on, whose first one is of `channel`.
  static auto normal_rows(const T* block, int64_t stride, const A* offsets, const A* scales, const A* weight,
                          const A* bias, int64_t channel, Tile tile) {
    return [=](auto lane, int64_t r, int64_t at, int64_t from, auto) {
      using V = decltype(lane);
      const auto of = [=](const A* parameter) {
        return PerPosition ? load<V>(parameter + tile.begin + from) : splat<V>(parameter[channel + r]);
      };
      const V below = load<V>(offsets + at) - load<V>(block + r * stride + from);
      return V(of(bias) - below * load<V>(scales + at) * of(weight));
    };
  }

  template <class V>
  static void add_at(A* p, V v) {
    store(p, load<V>(p) + v);
  }

  // The epilogue of a block whose first number is number `at` of the tensors.
  template <int R, class Epilogue>
  static auto behind_rows(const Epilogue& epilogue, int64_t at, int64_t stride, int64_t channel, Tile tile) {
    return epilogue.template rows<R, PerPosition>(at, stride, PerPosition ? tile.begin : channel);
  }

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
