// The same, backward.
#pragma once

#include "columns.h"

namespace divnorm::DIVNORM_ISA {

template <class T>
class BackwardColumns {
 public:
  using Layout = Columns<T>;
  using A = typename Layout::A;
  using Wide = typename Layout::Wide;

  struct Shared {
    const Problem& problem;
    const BackwardTensors& tensors;
    Layout layout;
    const A *weight, *bias;
    const Beside<T> beside;
    const SmoothRooms<A>& smooth;
    bool stream;
    A l1_scale;
    A *dweight, *dbias, *dthreshold;  // partial sums: (blocks, channels); the last may be null
    double* for_sigma;                // (samples of the maps, groups)
    A* scratch;  // (teams, 4 tiles + 6, channels): the tiles' sums; means, offsets, rstds, scales, slopes, shifts
  };

  BackwardColumns(const Shared& shared, const Member& member)
      : s_(shared), smooth_room_(shared.smooth.of(member.thread)) {
    const int64_t channels = s_.layout.channels(), tiles = s_.layout.tiles();
    A* next = s_.scratch + member.team * (4 * tiles + 6) * channels;
    for (A** rows : {&g_, &gv_, &sign_, &stopped_}) {
      *rows = next;
      next += tiles * channels;
    }
    for (A** row : {&mean_, &offset_, &rstd_, &scale_, &slope_, &shift_}) {
      *row = next;
      next += channels;
    }
  }

  void work(const WholeUnit& unit, const Member& member) {
    const Problem& p = s_.problem;
    const int64_t tiles = s_.layout.tiles();
    const T* x = static_cast<const T*>(s_.tensors.x);
    const bool l1 = s_.l1_scale != 0;
    member.sync();
    member.share(0, p.groups, [&](int64_t from, int64_t to) {
      for (int64_t group = from; group < to; ++group) {
        const RowScale<A> row = given_scale<A>(p, s_.tensors, unit.row(p) + group);
        s_.layout.each_channel(group, [&](int64_t at) {
          mean_[at] = row.mean;
          offset_[at] = row.offset(p);
          rstd_[at] = row.rstd;
          scale_[at] = row.rstd * s_.weight[at];
        });
      }
    });
    member.sync();
    if (s_.tensors.part == Part::second) {
      member.share(0, p.groups, [&](int64_t from, int64_t to) {
        for (int64_t group = from; group < to; ++group) use(group, given_slopes<A>(p, s_.tensors, unit.row(p) + group));
      });
      member.sync();
    } else {
      sum_up(unit, x, member);
    }
    if (s_.tensors.part == Part::first) return;
    smooth_room_.second_look();
    member.share(0, tiles, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t offset = s_.layout.offset(unit.rows, i);
        T* dx = static_cast<T*>(s_.tensors.dx) + offset;
        const uintptr_t bits = reinterpret_cast<uintptr_t>(dx) | (s_.layout.channels() * sizeof(T));
        const bool stream = s_.stream && (!is_pair<Wide> || bits % kVectorBytes == 0);
        with_kinks<T>(p, s_.beside, l1, [&](auto epilogue, auto kinks, auto sloped) {
          with_exponent<kinks.value>(p, [&](auto exponent) {
            const auto run = [&](auto stream) {
              gradient<stream.value, kinks.value, exponent.value>(i, offset, x + offset,
                                                                  gradients<sloped.value>(Look::second), epilogue, dx);
            };
            specialize_if<kStreams<T>>(run, stream);
          });
        });
      }
    });
    if (s_.stream) stream_fence();
  }

 private:
  // The first look at a unit: its rows' sums and the parameters' gradients, and what the second goes by.
  void sum_up(const WholeUnit& unit, const T* x, const Member& member) {
    const Problem& p = s_.problem;
    smooth_room_.first_look();
    member.share(0, s_.layout.tiles(), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t offset = s_.layout.offset(unit.rows, i);
        with_kinks<T>(p, s_.beside, s_.l1_scale != 0, [&](auto epilogue, auto kinks, auto sloped) {
          tile_sums<kinks.value>(i, offset, x + offset, gradients<sloped.value>(Look::first), epilogue);
        });
      }
    });
    member.sync();
    member.share(0, s_.layout.channels(), [&](int64_t from, int64_t to) { join_tiles(from, to); });
    member.sync();
    member.share(0, p.groups, [&](int64_t from, int64_t to) {
      for (int64_t group = from; group < to; ++group) join_channels(unit, group);
    });
    member.sync();
  }

  template <bool Sloped>
  Gradients<T, Wide, Sloped> gradients(Look look) {
    return {s_.problem, s_.beside, smooth_room_, static_cast<const T*>(s_.tensors.dy), look};
  }

  // Sums without the weight.
  template <Kinks K, class Epilogue, bool Sloped>
  [[gnu::flatten]] void tile_sums(int64_t tile, int64_t first, const T* x, Gradients<T, Wide, Sloped> dy,
                                  Epilogue epilogue) const {
    constexpr bool kSigns = K == Kinks::signs;
    const int64_t channels = s_.layout.channels(), pixels = s_.layout.pixels_of(tile);
    A *g = g_ + tile * channels, *gv = gv_ + tile * channels, *signs = sign_ + tile * channels;
    A* rest = stopped_ + tile * channels;
    const T* given = dy.given() + first;
    const A *mean = mean_, *offset = offset_, *scale = scale_, *bias = s_.bias;
    const auto behind = epilogue.template rows<1, true>(first, channels, 0);
    const auto gradients = [&](auto block, int64_t pixel) {
      const T* in = x + pixel * channels;
      return dy.template rows<false>(first + pixel * channels, block.value, pixels - pixel, channels, channels,
                                     lane_places<Wide, false>(in, channels, channels),
                                     Layout::normal_rows(in, channels, offset, scale, bias));
    };
    const auto add = [=](auto& sums, int64_t pixel, int64_t c, const auto& gradients, int64_t r) {
      using V = value_of<decltype(sums)>;
      const int64_t at = pixel * channels + c;
      const V number = load<V>(x + at), top = number - load<V>(offset + c);
      V grad = load<V>(gradients.row(r) + c);
      if constexpr (K != Kinks::none) {
        const V z = top * load<V>(scale + c) + load<V>(bias + c);
        if constexpr (Epilogue::kStops) sums[kSigns ? 3 : 2] += behind.template stopped<V>(grad, z, pixel, c);
        grad = behind.template gradient<V>(grad, z, pixel, c);
      }
      if constexpr (kSigns) sums[2] += sign(number - load<V>(mean + c));
      sums[0] += grad;
      sums[1] += grad * top;
    };
    if constexpr (kSigns && Epilogue::kStops)
      s_.layout.template sum_pixels_of<4, 2>(pixels, {x, given}, {g, gv, signs, rest}, gradients, add);
    else if constexpr (Epilogue::kStops)
      s_.layout.template sum_pixels_of<3, 2>(pixels, {x, given}, {g, gv, rest}, gradients, add);
    else if constexpr (kSigns)
      s_.layout.template sum_pixels_of<3, 2>(pixels, {x, given}, {g, gv, signs}, gradients, add);
    else
      s_.layout.template sum_pixels_of<2, 2>(pixels, {x, given}, {g, gv}, gradients, add);
  }

  void join_tiles(int64_t from, int64_t to) const {
    const int64_t channels = s_.layout.channels();
    const bool stops = s_.dthreshold != nullptr;
    for (A* sums :
         {g_, gv_, needs_more_than_v(s_.problem, s_.l1_scale != 0) ? sign_ : nullptr, stops ? stopped_ : nullptr})
      for (int64_t i = 1; sums != nullptr && i < s_.layout.tiles(); ++i)
        for (int64_t c = from; c < to; ++c) sums[c] += sums[i * channels + c];
  }

  void join_channels(const WholeUnit& unit, int64_t group) const {
    const Problem& p = s_.problem;
    const int64_t number = unit.row(p) + group;
    const RowScale<A> row = given_scale<A>(p, s_.tensors, number);
    A* dweight = s_.dweight + unit.block * s_.layout.channels();
    A* dbias = s_.dbias + unit.block * s_.layout.channels();
    A* dthreshold = s_.dthreshold == nullptr ? nullptr : s_.dthreshold + unit.block * s_.layout.channels();
    const bool signs = needs_more_than_v(p, s_.l1_scale != 0);
    GradientSums all{};
    s_.layout.each_channel(group, [&](int64_t at) {
      all.g += static_cast<double>(s_.weight[at]) * g_[at];
      all.gv += static_cast<double>(s_.weight[at]) * gv_[at];
      if (signs) all.sign += sign_[at];
      dweight[at] = (unit.fresh ? 0 : dweight[at]) + gv_[at] * row.rstd;
      dbias[at] = (unit.fresh ? 0 : dbias[at]) + g_[at];
      if (dthreshold != nullptr) dthreshold[at] = (unit.fresh ? 0 : dthreshold[at]) + stopped_[at];
    });
    const double count = static_cast<double>(s_.layout.pixels()) * s_.layout.group_channels();
    const RowSlopes<A> slopes = row_slopes<A>(p, all, row.rstd, s_.l1_scale, count);
    s_.for_sigma[number] = slopes.for_sigma;
    if (s_.tensors.sums != nullptr) write_sums<A>(p, s_.tensors, number, all);
    use(group, slopes);
  }

  // Makes the gradients of the channels of a group by these.
  void use(int64_t group, const RowSlopes<A>& slopes) const {
    s_.layout.each_channel(group, [&](int64_t at) {
      slope_[at] = slopes.slope;
      shift_[at] = slopes.shift;
    });
  }

  // P: as with_exponent() has it.
  template <bool Stream, Kinks K, int P, class Epilogue, bool Sloped>
  [[gnu::flatten]] void gradient(int64_t tile, int64_t at, const T* x, Gradients<T, Wide, Sloped> dy, Epilogue epilogue,
                                 T* dx) const {
    constexpr bool kSigns = K == Kinks::signs;
    const int64_t channels = s_.layout.channels();
    const A *mean = mean_, *offset = offset_, *rstd = rstd_, *scale = scale_, *slope = slope_, *shift = shift_;
    const A *weight = s_.weight, *bias = s_.bias;
    const A l1_scale = s_.l1_scale;
    const int64_t pixels = s_.layout.pixels_of(tile);
    Layout::template each_block<Stream ? 1 : kPixelsAtOnce>(pixels, [&](auto block, int64_t first) {
      constexpr int R = block.value;
      const T *in = x + first * channels, *given = dy.given() + at + first * channels;
      T* out = dx + first * channels;
      const auto behind = epilogue.template rows<R, true>(at + first * channels, channels, 0);
      const auto grads = dy.template rows<Stream>(at + first * channels, R, pixels - first, channels, channels,
                                                  lane_places<Wide, Stream>(out, channels, channels),
                                                  Layout::normal_rows(in, channels, offset, scale, bias));
      for_lanes_writing<Wide, Stream>(out, channels, [=](auto lane, int64_t c) {
        using V = decltype(lane);
        const auto normal = [=](int r) {
          const V top = load<V>(in + r * channels + c) - load<V>(offset + c);
          return top * load<V>(scale + c) + load<V>(bias + c);
        };
        if constexpr (!Stream) {
          prefetch_next<R>(in + c, channels);
          prefetch_next<R>(given + c, channels);
        }
        const V average = load<V>(mean + c), factor = load<V>(weight + c), inverse = load<V>(rstd + c);
        const V falling = load<V>(slope + c), constant = load<V>(shift + c);
        for (int r = 0; r < R; ++r) {
          const V centred = load<V>(in + r * channels + c) - average;
          V grad = load<V>(grads.row(r) + c);
          if constexpr (K != Kinks::none) {
            grad = behind.template gradient<V>(grad, normal(r), r, c);
            behind.template keep<Stream>(grad, r, c);
          }
          V result = grad * factor;
          if constexpr (P == 2) result -= falling * centred;
          result = result * inverse - constant;
          if constexpr (kSigns) result += (P == 1 ? splat<V>(l1_scale) - falling : splat<V>(l1_scale)) * sign(centred);
          write<Stream>(out + r * channels + c, result);
        }
      });
    });
  }

  const Shared& s_;
  SmoothRoom<A> smooth_room_;
  A *g_, *gv_, *sign_, *stopped_, *mean_, *offset_, *rstd_, *scale_, *slope_, *shift_;
};

}  // namespace divnorm::DIVNORM_ISA
