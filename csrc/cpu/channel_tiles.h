// From tensors to passes: memory itself where it has rows of the type of the sums, copies elsewhere.
#pragma once

#include "channel_passes.h"

namespace divnorm::DIVNORM_ISA {

// What a thread has to bring the tiles of a tensor to a pass.
template <class T>
class Tiles {
 public:
  using A = Acc<T>;

  Tiles(const ChannelPlan<A>& plan, bool backward, bool streams)
      : plan_(plan),
        streams_(streams),
        copies_(plan, streams),
        x_(copied()),
        dy_(backward ? copied() : 0),
        out_(copied()) {}

  // pass.run(form, group) for a tile's groups; dy may be null, and so may what is written.
  template <class Form, class Pass>
  void run(Form form, Pass& pass, const ChannelTile& tile, const T* x, const T* dy, T* out) const {
    x += tile.offset;
    dy = dy == nullptr ? nullptr : dy + tile.offset;
    out = out == nullptr ? nullptr : out + tile.offset;
    int64_t direct = 0;
    if constexpr (kDirect)
      if (!plan_.side_by_side) {
        direct = tile.count / kWide * kWide;
        groups(form, pass, direct, {x, plan_.inner}, {dy, plan_.inner}, {out, plan_.inner}, streams_);
      }
    const int64_t count = tile.count - direct;
    if (count == 0) return;
    copies_.load_tile(x + direct, count, true, rows(x_));  // divisors that fill up are no worse than others
    if (dy != nullptr) copies_.load_tile(dy + direct, count, false, rows(dy_));
    groups(form, pass, count, {x_.data(), stride()}, {dy_.data(), stride()}, rows(out_), false);
    if (out != nullptr) copies_.store_tile(rows(out_), count, out + direct);
  }

  // Whether results in memory may bypass the cache.
  static bool may_stream(const ChannelPlan<A>& plan, const T* out) {
    constexpr uintptr_t step = kVectorBytes;
    return kStreams<T> && (plan.side_by_side || (reinterpret_cast<uintptr_t>(out) % step == 0 &&
                                                 static_cast<uintptr_t>(plan.inner) * sizeof(T) % step == 0));
  }

 private:
  static constexpr int64_t kWide = kLanes<A>;
  static constexpr bool kDirect = std::is_same_v<T, A>;

  int64_t stride() const { return kDirect && !plan_.side_by_side ? kWide : plan_.positions; }
  int64_t copied() const { return plan_.channels * stride(); }
  RowsView<A> rows(const Buffer<A>& copy) const { return {copy.data(), stride()}; }

  template <class Form, class Pass>
  static void groups(Form form, Pass& pass, int64_t count, RowsView<const A> x, RowsView<const A> dy, RowsView<A> out,
                     bool streams) {
    int64_t i = 0;
    for (; i + 2 * kWide <= count; i += 2 * kWide)
      pass.run(form, Group<A, 2>{x.from(i), dy.from(i), out.from(i), streams});
    for (; i < count; i += kWide) pass.run(form, Group<A, 1>{x.from(i), dy.from(i), out.from(i), streams});
  }

  const ChannelPlan<A>& plan_;
  bool streams_;
  ChannelCopies<T> copies_;
  Buffer<A> x_, dy_, out_;
};

}  // namespace divnorm::DIVNORM_ISA
