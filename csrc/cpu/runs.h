// How rows of contiguous numbers are cut: x of shape (batch, channels, positions), one weight a channel's plane; or,
// AlongRow, x with one position a channel or of the (N, F) form, whose rows are their groups' channels and parameters
// run along them. Chunks for reductions, pieces for a pass.
#pragma once

#include "smooth.h"
#include "whole.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kSmoothRun = 2048;  // numbers that a smooth activation is made of at once

template <class T, bool AlongRow>
class Runs {
 public:
  using A = Acc<T>;
  using Wide = std::conditional_t<std::is_same_v<T, BFloat16>, Pair, Vec<A>>;
  static constexpr bool kColumns = false, kAlongRow = AlongRow;

  // A plane, or where it is long a range of it; AlongRow, a range of the row.
  struct Piece {
    int64_t offset, channel, size;  // channel: of the first number
  };

  explicit Runs(const Problem& p)
      : channels_(p.affine_size()), n_(channels_ / p.groups), plane_(AlongRow ? 1 : p.positions()), run_(n_ * plane_) {
    length_ = AlongRow ? run_ : plane_;
    pieces_ = divide_up(length_, kPiece);
    runs_of_chunk_ = kChunk / run_;
  }

  static int64_t parameter_place(const Problem& p, int64_t i) {
    const int64_t n = p.affine_size() / p.groups;
    return AlongRow ? i / n * n + lane_place<Wide>(i % n, n) : i;
  }

  int64_t run() const { return run_; }
  int64_t start(int64_t sample, int64_t group) const { return sample * channels_ * plane_ + group * run_; }
  int64_t pieces_of_sample() const { return planes() * pieces_; }
  int64_t pieces(const Unit& unit) const { return unit.samples * pieces_of_sample(); }

  // body(index, piece) for pieces from..to of the unit.
  template <class Body>
  void each_piece(const Unit& unit, int64_t from, int64_t to, Body&& body) const {
    int64_t sample = unit.sample, plane = 0, part = 0;
    if (from > 0) {
      const int64_t own = from % pieces_of_sample();
      sample += from / pieces_of_sample();
      plane = own / pieces_;
      part = own % pieces_;
    }
    for (int64_t i = from; i < to; ++i) {
      const int64_t first = part * kPiece, channel = unit.group * n_ + (AlongRow ? first : plane);
      body(i, Piece{start(sample, unit.group) + plane * length_ + first, channel, smaller(kPiece, length_ - first)});
      if (++part < pieces_) continue;
      part = 0;
      if (++plane < planes()) continue;
      plane = 0;
      ++sample;
    }
  }

  // Chunks: a range of a long run, or some short ones.
  int64_t chunks(const Unit& unit) const {
    if (run_ >= kChunk) return unit.samples * divide_up(run_, kChunk);
    return unit.samples <= runs_of_chunk_ ? 1 : divide_up(unit.samples, runs_of_chunk_);
  }

  // body(offset, size) for the ranges of a chunk.
  template <class Body>
  void each_range(const Unit& unit, int64_t index, Body&& body) const {
    if (run_ >= kChunk) {
      const int64_t per_run = divide_up(run_, kChunk), first = index % per_run * kChunk;
      return body(start(unit.sample + index / per_run, unit.group) + first, smaller(kChunk, run_ - first));
    }
    const int64_t last = smaller((index + 1) * runs_of_chunk_, unit.samples);
    for (int64_t i = index * runs_of_chunk_; i < last; ++i) body(start(unit.sample + i, unit.group), run_);
  }

  // The affine map of v rstd, the same in both directions: an activation's slope follows it.
  template <class V>
  static V affine(V centred, A rstd, A scale, const A* weight, A bias, const A* biases, int64_t i) {
    if constexpr (AlongRow)
      return centred * splat<V>(rstd) * load<V>(weight + i) + load<V>(biases + i);
    else
      return centred * splat<V>(scale) + splat<V>(bias);
  }

  // Rows that begin with piece i of a unit and lie evenly.
  struct Rows {
    int64_t count, stride;
    bool own_channels;  // or one for all
  };

  // Those before piece `to` of which copies are made at once; one that is alone where a row is long, or where its place
  // in memory does not tell that of the next one (`aligned`, as streaming Pairs have to be).
  Rows rows_from(int64_t i, int64_t to, bool aligned) const {
    if (AlongRow || length_ > kSmoothRun || (aligned && is_pair<Wide> && length_ * sizeof(T) % kVectorBytes != 0))
      return {1, 0, false};
    if (n_ == 1) return {to - i, channels_ * plane_, false};
    return {smaller(to - i, n_ - i % n_), plane_, true};
  }

  // body(first, size) for the parts of a piece of which copies are made at once; without copies it is one part.
  template <class Body>
  static void each_part(const Piece& piece, bool copied, Body&& body) {
    const int64_t most = copied ? kSmoothRun : piece.size;
    for (int64_t i = 0; i < piece.size; i += most) body(i, smaller(most, piece.size - i));
  }

  // How many such parts a unit has.
  int64_t parts(const Unit& unit) const { return unit.samples * planes() * divide_up(length_, kSmoothRun); }
  int64_t longest_part() const { return smaller(length_, kSmoothRun); }

  // The numbers that an epilogue is given of rows from x on, whose parameters begin with those given.
  static auto normal_rows(const T* x, const Rows& rows, A offset, A rstd, const A* weights, const A* biases) {
    return [=, stride = rows.stride, own = rows.own_channels](auto lane, int64_t r, int64_t, int64_t i, auto) {
      using V = decltype(lane);
      const A *w = weights + (own ? r : 0), *b = biases + (own ? r : 0);
      const V top = load<V>(x + r * stride + i) - splat<V>(offset);
      return V(affine<V>(top, rstd, rstd * *w, w, *b, b, i));
    };
  }

 private:
  int64_t planes() const { return AlongRow ? 1 : n_; }

  int64_t channels_, n_, plane_, run_, length_ = 0, pieces_ = 0, runs_of_chunk_ = 0;
};

}  // namespace divnorm::DIVNORM_ISA
