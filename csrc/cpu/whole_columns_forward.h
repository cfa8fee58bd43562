// Whole fields of x of shape (batch, positions, channels), channels contiguous: every channel's sums first, side by
// side in the lanes, then those of its group. Over the batch all pixels are one sample's. A unit holds all groups.
#pragma once

#include "columns.h"

namespace divnorm::DIVNORM_ISA {

template <class T>
class ForwardColumns {
 public:
  using Layout = Columns<T>;
  using A = typename Layout::A;
  using Wide = typename Layout::Wide;

  struct Shared {
    const Problem& problem;
    const ForwardTensors& tensors;
    Layout layout;
    const A *weight, *bias;
    const Beside<T> beside;
    const SmoothRooms<A>& smooth;
    const double* sigma;
    bool stream;
    A* scratch;  // (teams, 2 tiles + 3, channels): the tiles' means and powers, the channels' means, offsets, scales
    A* thread_scratch;  // (threads, channels)
    double* l1;         // (samples, tiles), or null
  };

  ForwardColumns(const Shared& shared, const Member& member)
      : s_(shared), smooth_room_(shared.smooth.of(member.thread)) {
    const int64_t channels = s_.layout.channels(), tiles = s_.layout.tiles();
    means_ = s_.scratch + member.team * (2 * tiles + 3) * channels;
    powers_ = means_ + tiles * channels;
    mean_ = powers_ + tiles * channels;
    offset_ = mean_ + channels;
    scale_ = offset_ + channels;
    own_ = s_.thread_scratch + member.thread * channels;
  }

  void work(const WholeUnit& unit, const Member& member) {
    const Problem& p = s_.problem;
    const int64_t tiles = s_.layout.tiles();
    const T* x = static_cast<const T*>(s_.tensors.x);
    member.sync();
    const auto each_tile = [&](auto&& body) {
      member.share(0, tiles, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) body(i, x + s_.layout.offset(unit.rows, i));
      });
      member.sync();
    };
    const auto each_group = [&](auto&& body) {
      member.share(0, p.groups, [&](int64_t from, int64_t to) {
        for (int64_t group = from; group < to; ++group) body(group);
      });
      member.sync();
    };
    if (s_.tensors.part == Part::second) {
      each_group([&](int64_t group) { use(group, given_scale<A>(p, s_.tensors, unit.row(p) + group)); });
    } else {
      find_statistics(unit, each_tile, each_group, member);
    }
    if (s_.tensors.part == Part::first) return;
    write_result(unit, x, member);
  }

 private:
  template <class EachTile, class EachGroup>
  void find_statistics(const WholeUnit& unit, EachTile&& each_tile, EachGroup&& each_group,
                       const Member& member) const {
    const Problem& p = s_.problem;
    if (p.summation.present) {
      each_tile([&](int64_t i, const T* in) { centred_moments(i, in); });
      member.share(0, s_.layout.channels(), [&](int64_t from, int64_t to) { join_moments(from, to); });
      member.sync();
      if (p.p == 1 && p.suppression.present) each_group([&](int64_t group) { join_means(group); });
    }
    if (p.suppression.present && (p.p == 1 || !p.summation.present)) {
      each_tile([&](int64_t i, const T* in) { p.p == 1 ? absolutes(i, in) : squares(i, in); });
      member.share(0, s_.layout.channels(), [&](int64_t from, int64_t to) { join_sums(from, to); });
      member.sync();
    }
    each_group([&](int64_t group) { finish_statistics(unit, group); });
  }

  void write_result(const WholeUnit& unit, const T* x, const Member& member) const {
    const Problem& p = s_.problem;
    const int64_t tiles = s_.layout.tiles();
    member.share(0, tiles, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        double* l1 = s_.l1 == nullptr ? nullptr : s_.l1 + unit.rows.sample * tiles + i;
        const int64_t offset = s_.layout.offset(unit.rows, i);
        T* y = static_cast<T*>(s_.tensors.y) + offset;
        const bool stream = s_.stream && streamable(y);
        const auto run = [&](auto epilogue) {
          const auto write = [&](auto stream, auto l1) {
            return normalize<stream.value, l1.value>(i, offset, x + offset, epilogue, y);
          };
          return specialize_if<kStreams<T>>(write, stream, l1 != nullptr);
        };
        const SmoothRows<T, Wide> smooth(p, s_.beside, smooth_room_);
        const double sum = is_smooth(p) ? run(smooth) : with_epilogue<T>(p, s_.beside, run);
        if (l1 != nullptr) *l1 = sum;
      }
    });
    if (s_.stream) stream_fence();
  }

  bool streamable(const T* y) const {
    const uintptr_t bits = reinterpret_cast<uintptr_t>(y) | (s_.layout.channels() * sizeof(T));
    return !is_pair<Wide> || bits % kVectorBytes == 0;
  }

  [[gnu::flatten]] void centred_moments(int64_t tile, const T* x) const {
    const int64_t channels = s_.layout.channels(), pixels = s_.layout.pixels_of(tile);
    A *mean = means_ + tile * channels, *m2 = powers_ + tile * channels, *error = own_;
    s_.layout.template sum_pixels<1, 1>(pixels, {x}, {mean}, [=](auto& sums, int64_t pixel, int64_t c) {
      sums[0] += load<value_of<decltype(sums)>>(x + pixel * channels + c);
    });
    const A share = A(1) / pixels;
    for (int64_t c = 0; c < channels; ++c) mean[c] *= share;
    s_.layout.template sum_pixels<2, 1>(pixels, {x}, {error, m2}, [=](auto& sums, int64_t pixel, int64_t c) {
      using V = value_of<decltype(sums)>;
      const V centred = load<V>(x + pixel * channels + c) - load<V>(mean + c);
      sums[0] += centred;
      sums[1] += centred * centred;
    });
    for (int64_t c = 0; c < channels; ++c) {
      const A step = error[c] * share;
      m2[c] -= error[c] * step;
      mean[c] = step - step == 0 ? mean[c] + step : mean[c];
    }
  }

  [[gnu::flatten]] void squares(int64_t tile, const T* x) const {
    const int64_t channels = s_.layout.channels();
    s_.layout.template sum_pixels<1, 1>(s_.layout.pixels_of(tile), {x}, {powers_ + tile * channels},
                                        [=](auto& sums, int64_t pixel, int64_t c) {
                                          const auto value = load<value_of<decltype(sums)>>(x + pixel * channels + c);
                                          sums[0] += value * value;
                                        });
  }

  // Sums of |x - mean|, or without one of |x|.
  [[gnu::flatten]] void absolutes(int64_t tile, const T* x) const {
    const int64_t channels = s_.layout.channels();
    const A* mean = s_.problem.summation.present ? mean_ : nullptr;
    s_.layout.template sum_pixels<1, 1>(s_.layout.pixels_of(tile), {x}, {powers_ + tile * channels},
                                        [=](auto& sums, int64_t pixel, int64_t c) {
                                          using V = value_of<decltype(sums)>;
                                          const V number = load<V>(x + pixel * channels + c);
                                          sums[0] += absolute(mean == nullptr ? number : number - load<V>(mean + c));
                                        });
  }

  // The sums of channels from..to over all tiles, into those of the first.
  void join_sums(int64_t from, int64_t to) const {
    const int64_t channels = s_.layout.channels();
    for (int64_t i = 1; i < s_.layout.tiles(); ++i)
      for (int64_t c = from; c < to; ++c) powers_[c] += powers_[i * channels + c];
  }

  // The same for moments.
  void join_moments(int64_t from, int64_t to) const {
    const int64_t channels = s_.layout.channels();
    double seen = s_.layout.pixels_of(0);
    for (int64_t i = 1; i < s_.layout.tiles(); ++i) {
      const A *mean = means_ + i * channels, *m2 = powers_ + i * channels;
      const double count = s_.layout.pixels_of(i);
      const A share = static_cast<A>(count / (seen + count)), spread = static_cast<A>(seen * count / (seen + count));
      for (int64_t c = from; c < to; ++c) {
        const A step = mean[c] - means_[c];
        means_[c] = step - step == 0 ? means_[c] + step * share : means_[c] + mean[c];
        powers_[c] += m2[c] + step * step * spread;
      }
      seen += count;
    }
  }

  double mean_of(int64_t group) const {
    double sum = 0;
    s_.layout.each_channel(group, [&](int64_t at) { sum += means_[at]; });
    return sum / static_cast<double>(s_.layout.group_channels());
  }

  void join_means(int64_t group) const {
    const A mean = static_cast<A>(mean_of(group));
    s_.layout.each_channel(group, [&](int64_t at) { mean_[at] = mean; });
  }

  void finish_statistics(const WholeUnit& unit, int64_t group) const {
    const Problem& p = s_.problem;
    const double each = static_cast<double>(s_.layout.pixels()), n = static_cast<double>(s_.layout.group_channels());
    Moments all{each * n, p.summation.present ? mean_of(group) : 0, 0};
    if (p.suppression.present)
      s_.layout.each_channel(group, [&](int64_t at) {
        const double step = p.summation.present && p.p == 2 ? means_[at] - all.mean : 0;
        all.m2 += powers_[at] + each * step * step;
      });
    const RowScale<A> row = row_scale<A>(p, all, s_.sigma[group]);
    write_statistics(p, s_.tensors, unit.row(p) + group, row, all);
    use(group, row);
  }

  // Normalizes the channels of a group by this.
  void use(int64_t group, const RowScale<A>& row) const {
    s_.layout.each_channel(group, [&](int64_t at) {
      mean_[at] = row.mean;
      offset_[at] = row.offset(s_.problem);
      scale_[at] = row.rstd * s_.weight[at];
    });
  }

  template <bool Stream, bool L1, class Epilogue>
  [[gnu::flatten]] double normalize(int64_t tile, int64_t at, const T* x, Epilogue epilogue, T* y) const {
    const int64_t channels = s_.layout.channels();
    const A *mean = mean_, *offset = offset_, *scale = scale_, *bias = s_.bias;
    double l1 = 0;
    Layout::template each_block<Stream ? 1 : kPixelsAtOnce>(s_.layout.pixels_of(tile), [&](auto block, int64_t first) {
      constexpr int R = block.value;
      const T* in = x + first * channels;
      T* out = y + first * channels;
      const auto behind = epilogue.template rows<R, true>(at + first * channels, channels, 0);
      Totals<A, 1> absolutes;
      for_lanes_writing<Wide, Stream>(out, channels, [=, &absolutes](auto lane, int64_t c) {
        using V = decltype(lane);
        if constexpr (!Stream) prefetch_next<R>(in + c, channels);
        const V centre = load<V>(offset + c), factor = load<V>(scale + c), shift = load<V>(bias + c);
        for (int r = 0; r < R; ++r) {
          const V number = load<V>(in + r * channels + c), top = number - centre;
          write<Stream>(out + r * channels + c, behind.template value<V>(top * factor + shift, r, c));
          if constexpr (L1) absolutes.add(0, absolute(number - load<V>(mean + c)));
        }
      });
      if constexpr (L1) l1 += absolutes.value(0);
    });
    return l1;
  }

  // The same where the epilogue is a smooth activation.
  template <bool Stream, bool L1>
  [[gnu::flatten]] double normalize(int64_t tile, int64_t at, const T* x, SmoothRows<T, Wide> behind, T* y) const {
    const int64_t channels = s_.layout.channels(), pixels = s_.layout.pixels_of(tile);
    const A* mean = mean_;
    double l1 = 0;
    for (int64_t first = 0, rows; first < pixels; first += rows) {
      rows = behind.room(channels, pixels - first);
      const T* in = x + first * channels;
      T* out = y + first * channels;
      Totals<A, 1> absolutes;
      const auto each = lane_places<Wide, Stream>(out, channels, channels);
      const A* values = behind.values(at + first * channels, rows, channels, channels, each,
                                      Layout::normal_rows(in, channels, offset_, scale_, s_.bias));
      for (int64_t r = 0; r < rows; ++r)
        each(r, [=, &absolutes](auto lane, int64_t place, int64_t c, auto) {
          using V = decltype(lane);
          write<Stream>(out + r * channels + c, load<V>(values + r * behind.width(channels) + place));
          if constexpr (L1) absolutes.add(0, absolute(load<V>(in + r * channels + c) - load<V>(mean + c)));
        });
      if constexpr (L1) l1 += absolutes.value(0);
    }
    return l1;
  }

  const Shared& s_;
  SmoothRoom<A> smooth_room_;
  A *means_, *powers_, *mean_, *offset_, *scale_, *own_;
};

}  // namespace divnorm::DIVNORM_ISA
