// How channels that lie side by side are cut for reductions: tiles of pixels, and sums of them channel by channel.
#pragma once

#include "smooth.h"
#include "whole.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kTileNumbers = 8192;  // of a tile: looked at twice, it stays in a near cache
constexpr int64_t kFewestPixels = 32;   // of a tile: its sums are as many as the channels
constexpr int kPixelsAtOnce = 4;        // they share loads of per-channel numbers

template <class T>
class Columns {
 public:
  using A = Acc<T>;
  using Wide = std::conditional_t<std::is_same_v<T, BFloat16>, Pair, Vec<A>>;

  explicit Columns(const Problem& p)
      : channels_(p.affine_size()),
        n_(channels_ / p.groups),
        pixels_(p.numel() / p.batch / channels_ * (p.over_batch ? p.batch : 1)),
        tile_(balanced(pixels_, larger(kFewestPixels, kTileNumbers / channels_))) {}

  static int64_t parameter_place(const Problem& p, int64_t i) { return place(i, p.affine_size()); }
  static int64_t place(int64_t channel, int64_t channels) { return lane_place<Wide>(channel, channels); }

  int64_t channels() const { return channels_; }
  int64_t group_channels() const { return n_; }
  int64_t pixels() const { return pixels_; }
  int64_t tiles() const { return divide_up(pixels_, tile_); }
  int64_t pixels_of(int64_t tile) const { return smaller(tile_, pixels_ - tile * tile_); }
  int64_t offset(const Unit& unit, int64_t tile) const {
    return (unit.sample * pixels_ + tile * tile_) * channels_;  // over the batch, the sample is 0
  }

  // body(place) for the channels of a group.
  template <class Body>
  void each_channel(int64_t group, Body&& body) const {
    for (int64_t c = group * n_; c < (group + 1) * n_; ++c) body(place(c, channels_));
  }

  // body(pixels, first) for blocks of pixels of a tile, then single ones.
  template <int R, class Body>
  static void each_block(int64_t pixels, Body&& body) {
    int64_t i = 0;
    for (; i + R <= pixels; i += R) body(std::integral_constant<int, R>{}, i);
    for (; i < pixels; ++i) body(std::integral_constant<int, 1>{}, i);
  }

  // rows[kind][c] += what add(sums of kinds, pixel, c) adds, over the pixels of a tile.
  template <int Kinds, int Tensors, class Add>
  void sum_pixels(int64_t pixels, const T* const (&read)[Tensors], A* const (&rows)[Kinds], Add&& add) const {
    sum_pixels_of<Kinds, Tensors>(
        pixels, read, rows, [](auto, int64_t) { return nullptr; },
        [&](auto& sums, int64_t pixel, int64_t c, auto, int64_t) { add(sums, pixel, c); });
  }

  // The same by add(sums of kinds, pixel, c, block, which of it), where prepare(pixels, first) makes a block's.
  template <int Kinds, int Tensors, class Prepare, class Add>
  void sum_pixels_of(int64_t pixels, const T* const (&read)[Tensors], A* const (&rows)[Kinds], Prepare&& prepare,
                     Add&& add) const {
    for (A* row : rows) __builtin_memset(row, 0, channels_ * sizeof(A));
    each_block<kPixelsAtOnce>(pixels, [&](auto block, int64_t first) {
      constexpr int R = block.value;
      const auto prepared = prepare(block, first);
      for_lanes<Wide>(channels_, [&](auto lane, int64_t c) {
        using V = decltype(lane);
        for (const T* from : read) prefetch_next<R>(from + first * channels_ + c, channels_);
        V sums[Kinds];
        for (int k = 0; k < Kinds; ++k) sums[k] = load<V>(rows[k] + c);
        for (int r = 0; r < R; ++r) add(sums, first + r, c, prepared, r);
        for (int k = 0; k < Kinds; ++k) store(rows[k] + c, sums[k]);
      });
    });
  }

  // The numbers that an epilogue is given of pixels from `in` on.
  static auto normal_rows(const T* in, int64_t channels, const A* offset, const A* scale, const A* bias) {
    return [=](auto lane, int64_t r, int64_t, int64_t c, auto) {
      using V = decltype(lane);
      const V top = load<V>(in + r * channels + c) - load<V>(offset + c);
      return V(top * load<V>(scale + c) + load<V>(bias + c));
    };
  }

 private:
  // Tiles of at most `most` pixels and of about the same size.
  static int64_t balanced(int64_t pixels, int64_t most) { return divide_up(pixels, divide_up(pixels, most)); }

  int64_t channels_, n_, pixels_, tile_;
};

}  // namespace divnorm::DIVNORM_ISA
