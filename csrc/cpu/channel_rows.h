// Where the numbers of a tile are: a view has a row for each channel whose numbers are positions. Memory has such rows
// where positions lie side by side and numbers are of the type of the sums; elsewhere rows are copied, and turned.
#pragma once

#include "channel_plan.h"
#include "quads.h"

namespace divnorm::DIVNORM_ISA {

template <class A>
struct RowsView {
  A* first = nullptr;
  int64_t stride = 0;

  A* at(int64_t channel, int64_t position) const { return first + channel * stride + position; }
  RowsView from(int64_t position) const { return {first == nullptr ? nullptr : first + position, stride}; }
};

// Copies of tiles, for one thread.
template <class T>
class ChannelCopies {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  // streams: results bypass the cache.
  ChannelCopies(const ChannelPlan<A>& plan, bool streams)
      : plan_(plan),
        streams_(streams),
        line_(plan.side_by_side ? plan.numbers() : 0),
        zeros_(plan.side_by_side ? plan.channels : 0, true),
        unwanted_(plan.side_by_side ? plan.channels : 0) {}

  // Rows of `count` positions, and up to whole vectors of the last one again, or else of zeros.
  void load_tile(const T* x, int64_t count, bool again, const RowsView<A>& rows) const {
    if (plan_.side_by_side) return load_turned(x, count, again, rows);
    for (int64_t c = 0; c < plan_.channels; ++c) {
      const T* row = x + c * plan_.inner;
      prefetch_lines<kMostPositions * sizeof(T)>(row + plan_.positions);  // the next tile's
      int64_t i = 0;
      for (; i + kWide <= count; i += kWide) store(rows.at(c, i), load<V>(row + i));
      if (i < count) store(rows.at(c, i), splat<V>(again ? load<A>(row + count - 1) : A(0)));
      for (; i < count; ++i) *rows.at(c, i) = load<A>(row + i);
    }
  }

  void store_tile(const RowsView<A>& rows, int64_t count, T* y) const {
    if (plan_.side_by_side) return store_turned(rows, count, y);
    for (int64_t c = 0; c < plan_.channels; ++c) put_row(rows.at(c, 0), count, y + c * plan_.inner);
  }

 private:
  static constexpr int64_t kWide = kLanes<A>;

  void load_turned(const T* x, int64_t count, bool again, const RowsView<A>& rows) const {
    const int64_t channels = plan_.channels;
    const A* numbers;
    if constexpr (std::is_same_v<T, A>) {
      numbers = x;
    } else {
      for_lanes<V>(count * channels,
                   [x, line = line_.data()](auto lane, int64_t i) { store(line + i, load<decltype(lane)>(x + i)); });
      numbers = line_.data();
    }
    for (int64_t at = 0; at < count; at += kWide) {
      const A* from[kWide];
      for (int64_t i = 0; i < kWide; ++i)
        from[i] = at + i < count || again ? numbers + smaller(at + i, count - 1) * channels : zeros_.data();
      const T* next = x + (plan_.positions + at) * channels;  // that tile's numbers come while this one is computed
      int64_t c = 0;
      for (; c + kQuad<A> <= channels; c += kQuad<A>) {
        prefetch_lines<kWide * kQuad<A> * sizeof(T)>(next + c * kWide);
        V turned[kQuad<A>];
        for (int64_t k = 0; k < kQuad<A>; ++k) turned[k] = load_quads<A>(from + k, c);
        transpose_quads<A>(turned);
        for (int64_t k = 0; k < kQuad<A>; ++k) store(rows.at(c + k, at), turned[k]);
      }
      for (; c < channels; ++c)
        for (int64_t i = 0; i < kWide; ++i) *rows.at(c, at + i) = from[i][c];
    }
  }

  void store_turned(const RowsView<A>& rows, int64_t count, T* y) const {
    const int64_t channels = plan_.channels;
    A* numbers = line_.data();
    if constexpr (std::is_same_v<T, A>)
      if (!streams_) numbers = y;
    for (int64_t at = 0; at < count; at += kWide) {
      A* to[kWide];
      for (int64_t i = 0; i < kWide; ++i) to[i] = at + i < count ? numbers + (at + i) * channels : unwanted_.data();
      int64_t c = 0;
      for (; c + kQuad<A> <= channels; c += kQuad<A>) {
        V turned[kQuad<A>];
        for (int64_t k = 0; k < kQuad<A>; ++k) turned[k] = load<V>(rows.at(c + k, at));
        transpose_quads<A>(turned);
        for (int64_t k = 0; k < kQuad<A>; ++k) store_quads<A>(turned[k], to + k, c);
      }
      for (; c < channels; ++c)
        for (int64_t i = 0; i < kWide; ++i) to[i][c] = *rows.at(c, at + i);
    }
    if (numbers == line_.data()) put_row(numbers, count * channels, y);
  }

  void put_row(const A* row, int64_t count, T* y) const {
    specialize_if<kStreams<T>>(
        [&](auto stream) {
          constexpr bool Stream = decltype(stream)::value;
          for_lanes_writing<V, Stream>(
              y, count, [y, row](auto lane, int64_t i) { write<Stream>(y + i, load<decltype(lane)>(row + i)); });
        },
        streams_);
  }

  const ChannelPlan<A>& plan_;
  bool streams_;
  Buffer<A> line_, zeros_, unwanted_;
};

}  // namespace divnorm::DIVNORM_ISA
