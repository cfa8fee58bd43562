// Whole fields where a row lies in runs of contiguous numbers: x of shape (batch, channels, positions), one weight a
// channel's plane; or, AlongRow, x with one position a channel or of the (N, F) form, whose rows are their groups'
// channels and parameters run along them.
#pragma once

#include "epilogue.h"
#include "lanes.h"
#include "whole.h"

namespace divnorm::DIVNORM_ISA {

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

 private:
  int64_t planes() const { return AlongRow ? 1 : n_; }

  int64_t channels_, n_, plane_, run_, length_ = 0, pieces_ = 0, runs_of_chunk_ = 0;
};

template <class T, bool AlongRow>
class ForwardRuns {
 public:
  using Layout = Runs<T, AlongRow>;
  using A = typename Layout::A;
  using Wide = typename Layout::Wide;
  using Piece = typename Layout::Piece;

  struct Shared {
    const Problem& problem;
    const ForwardTensors& tensors;
    Layout layout;
    const A *weight, *bias;
    const Beside<T> beside;
    const double* sigma;
    bool stream;
    Moments* moments;  // (teams, chunks)
    double* l1;        // (rows, pieces), or null
    int64_t chunks, pieces;
  };

  ForwardRuns(const Shared& shared, const Member& member)
      : s_(shared), moments_(shared.moments + member.team * shared.chunks) {}

  void work(const WholeUnit& unit, const Member& member) {
    const Problem& p = s_.problem;
    const T* x = static_cast<const T*>(s_.tensors.x);
    const int64_t row = unit.row(p), pieces = s_.layout.pieces(unit.rows), chunks = s_.layout.chunks(unit.rows);
    member.sync();
    const auto look = [&](auto&& at) {
      member.share(0, chunks, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) moments_[i] = at(i);
      });
      member.sync();
    };
    Moments all{};
    if (p.summation.present) {
      look([&](int64_t i) { return centred_moments(unit.rows, i, x); });
      for (int64_t i = 0; i < chunks; ++i) all.join(moments_[i]);
    }
    if (p.suppression.present && (p.p == 1 || !p.summation.present)) {
      const A mean = static_cast<A>(all.mean);
      member.sync();
      look([&](int64_t i) { return p.p == 1 ? absolutes(unit.rows, i, x, mean) : squares(unit.rows, i, x); });
      all.count = all.m2 = 0;  // joined as sums, not as deviations
      for (int64_t i = 0; i < chunks; ++i) {
        all.count += moments_[i].count;
        all.m2 += moments_[i].m2;
      }
    }
    const RowScale<A> scale = row_scale<A>(p, all, s_.sigma[unit.rows.group]);
    if (member.rank == 0) write_statistics(p, s_.tensors, row, scale, all);
    member.share(0, pieces, [&](int64_t from, int64_t to) {
      s_.layout.each_piece(unit.rows, from, to, [&](int64_t i, const Piece& piece) {
        double* l1 = s_.l1 == nullptr ? nullptr : s_.l1 + row * s_.pieces + i;
        write_piece(piece, x, scale, l1);
      });
    });
    if (s_.stream) stream_fence();
  }

 private:
  [[gnu::flatten]] Moments centred_moments(const Unit& unit, int64_t index, const T* x) const {
    Sums<A, 1, 4> total;
    int64_t count = 0;
    s_.layout.each_range(unit, index, [&](int64_t offset, int64_t size) {
      const T* in = x + offset;
      for_chains<Wide, 4>(size,
                          [&](auto lane, int64_t i, int chain) { total.add(0, chain, load<decltype(lane)>(in + i)); });
      count += size;
    });
    const A average = total.value(0) / count;
    Sums<A, 2, 4> sums;
    s_.layout.each_range(unit, index, [&](int64_t offset, int64_t size) {
      const T* in = x + offset;
      for_chains<Wide, 4>(size, [&](auto lane, int64_t i, int chain) {
        using V = decltype(lane);
        const V centred = load<V>(in + i) - splat<V>(average);
        sums.add(0, chain, centred);
        sums.add(1, chain, centred * centred);
      });
    });
    // The second look also gives the mean's own rounding error.
    const double error = sums.value(0), step = error / count;
    return {static_cast<double>(count), step - step == 0 ? average + step : average, sums.value(1) - error * step};
  }

  [[gnu::flatten]] Moments squares(const Unit& unit, int64_t index, const T* x) const {
    Sums<A, 1, 4> total;
    int64_t count = 0;
    s_.layout.each_range(unit, index, [&](int64_t offset, int64_t size) {
      const T* in = x + offset;
      for_chains<Wide, 4>(size, [&](auto lane, int64_t i, int chain) {
        const auto value = load<decltype(lane)>(in + i);
        total.add(0, chain, value * value);
      });
      count += size;
    });
    return {static_cast<double>(count), 0, total.value(0)};
  }

  // The sum of |x - mean|.
  [[gnu::flatten]] Moments absolutes(const Unit& unit, int64_t index, const T* x, A mean) const {
    Sums<A, 1, 4> total;
    int64_t count = 0;
    s_.layout.each_range(unit, index, [&](int64_t offset, int64_t size) {
      const T* in = x + offset;
      for_chains<Wide, 4>(size, [&](auto lane, int64_t i, int chain) {
        using V = decltype(lane);
        total.add(0, chain, absolute(load<V>(in + i) - splat<V>(mean)));
      });
      count += size;
    });
    return {static_cast<double>(count), 0, total.value(0)};
  }

  void write_piece(const Piece& piece, const T* x, RowScale<A> scale, double* l1) const {
    T* y = static_cast<T*>(s_.tensors.y) + piece.offset;
    const bool stream = s_.stream && (!is_pair<Wide> || reinterpret_cast<uintptr_t>(y) % kVectorBytes == 0);
    const double sum = with_epilogue<T>(s_.problem, s_.beside, [&](auto epilogue) {
      const auto run = [&](auto stream, auto l1) {
        return normalize<stream.value, l1.value>(piece, x + piece.offset, scale, epilogue, y);
      };
      return specialize(run, stream, l1 != nullptr);
    });
    if (l1 != nullptr) *l1 = sum;
  }

  template <bool Stream, bool L1, class Epilogue>
  [[gnu::flatten]] double normalize(const Piece& piece, const T* x, RowScale<A> row, Epilogue epilogue, T* y) const {
    const A *weights = s_.weight + piece.channel, *biases = s_.bias + piece.channel;
    const A scale = row.rstd * *weights, bias = *biases, offset = row.offset(s_.problem);
    const auto behind = epilogue.template rows<1, AlongRow>(piece.offset, 0, piece.channel);
    Sums<A, 1, 1> absolutes;
    for_lanes_writing<Wide, Stream>(y, piece.size, [=, &absolutes](auto lane, int64_t i) {
      using V = decltype(lane);
      const V number = load<V>(x + i), top = number - splat<V>(offset);
      const V z = Layout::template affine<V>(top, row.rstd, scale, weights, bias, biases, i);
      write<Stream>(y + i, behind.template value<V>(z, 0, i));
      if constexpr (L1) absolutes.add(0, 0, absolute(number - splat<V>(row.mean)));
    });
    return absolutes.value(0);
  }

  const Shared& s_;
  Moments* moments_;
};

template <class T, bool AlongRow>
class BackwardRuns {
 public:
  using Layout = Runs<T, AlongRow>;
  using A = typename Layout::A;
  using Wide = typename Layout::Wide;
  using Piece = typename Layout::Piece;

  struct Shared {
    const Problem& problem;
    const BackwardTensors& tensors;
    Layout layout;
    const A *weight, *bias;
    const Beside<T> beside;
    bool stream;
    A l1_scale;
    A *dweight, *dbias, *dthreshold;  // partial sums: (blocks, affine_size); the last may be null
    double* for_sigma;                // (samples of the maps, groups)
    GradientSums* sums;               // (teams, pieces)
    int64_t pieces;
  };

  BackwardRuns(const Shared& shared, const Member& member)
      : s_(shared), sums_(shared.sums + member.team * shared.pieces) {}

  void work(const WholeUnit& unit, const Member& member) {
    const Problem& p = s_.problem;
    const Layout& layout = s_.layout;
    const T *x = static_cast<const T*>(s_.tensors.x), *dy = static_cast<const T*>(s_.tensors.dy);
    T* dx = static_cast<T*>(s_.tensors.dx);
    const int64_t row = unit.row(p), pieces = layout.pieces(unit.rows);
    RowScale<A> scale;
    if (p.summation.present) scale.mean = static_cast<const A*>(s_.tensors.mean)[row];
    if (p.suppression.present) scale.rstd = static_cast<const A*>(s_.tensors.rstd)[row];
    A* dweight = s_.dweight + unit.block * p.affine_size();
    A* dbias = s_.dbias + unit.block * p.affine_size();
    A* dthreshold = s_.dthreshold == nullptr ? nullptr : s_.dthreshold + unit.block * p.affine_size();
    member.sync();
    member.share(0, pieces, [&](int64_t from, int64_t to) {
      layout.each_piece(unit.rows, from, to, [&](int64_t i, const Piece& piece) {
        const T *in = x + piece.offset, *grads = dy + piece.offset;
        A *for_weight = dweight + piece.channel, *for_bias = dbias + piece.channel;
        A* for_threshold = dthreshold == nullptr ? nullptr : dthreshold + piece.channel;
        for (A* sums : {for_weight, for_bias, for_threshold})
          if (AlongRow && unit.fresh && sums != nullptr) __builtin_memset(sums, 0, piece.size * sizeof(A));
        sums_[i] = with_kinks<T>(p, s_.beside, s_.l1_scale != 0, [&](auto epilogue, auto kinks) {
          return piece_sums<kinks.value>(piece, in, grads, scale, epilogue, for_weight, for_bias, for_threshold);
        });
      });
    });
    member.sync();
    GradientSums all{};
    layout.each_piece(unit.rows, 0, pieces, [&](int64_t i, const Piece& piece) {
      const double weight = AlongRow ? 1 : s_.weight[piece.channel];
      all.g += weight * sums_[i].g;
      all.gv += weight * sums_[i].gv;
      all.sign += sums_[i].sign;
    });
    const double count = static_cast<double>(layout.run()) * unit.rows.samples;
    const RowSlopes<A> slopes = row_slopes<A>(p, all, scale.rstd, s_.l1_scale, count);
    if (member.rank == 0) {
      s_.for_sigma[row] = slopes.for_sigma;
      if constexpr (!AlongRow) add_planes(unit, scale.rstd, dweight, dbias, dthreshold);
    }
    member.share(0, pieces, [&](int64_t from, int64_t to) {
      layout.each_piece(unit.rows, from, to, [&](int64_t, const Piece& piece) {
        const T *in = x + piece.offset, *grads = dy + piece.offset;
        T* out = dx + piece.offset;
        const bool stream = s_.stream && (!is_pair<Wide> || reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0) &&
                            stream_alike(dx, s_.beside.dresidual);
        with_kinks<T>(p, s_.beside, s_.l1_scale != 0, [&](auto epilogue, auto kinks) {
          with_exponent<kinks.value>(p, [&](auto exponent) {
            const auto run = [&](auto stream) {
              gradient<stream.value, kinks.value, exponent.value>(piece, in, grads, scale, slopes, epilogue, out);
            };
            specialize(run, stream);
          });
        });
      });
    });
    if (s_.stream) stream_fence();
  }

 private:
  // Adds the planes' sums to those of their channels.
  void add_planes(const WholeUnit& unit, A rstd, A* dweight, A* dbias, A* dthreshold) const {
    const int64_t per_sample = s_.layout.pieces_of_sample(), pieces = s_.layout.pieces(unit.rows);
    int64_t before = -1;
    s_.layout.each_piece(unit.rows, 0, per_sample, [&](int64_t i, const Piece& piece) {
      const int64_t c = piece.channel;
      if (unit.fresh && c != before) {
        dweight[c] = dbias[c] = 0;
        if (dthreshold != nullptr) dthreshold[c] = 0;
      }
      before = c;
      double for_weight = 0, for_bias = 0, for_threshold = 0;
      for (int64_t j = i; j < pieces; j += per_sample) {
        for_weight += sums_[j].gv;
        for_bias += sums_[j].g;
        for_threshold += sums_[j].stopped;
      }
      dweight[c] += static_cast<A>(for_weight * rstd);
      dbias[c] += static_cast<A>(for_bias);
      if (dthreshold != nullptr) dthreshold[c] += static_cast<A>(for_threshold);
    });
  }

  // For a plane without its weight.
  template <bool Kinks, class Epilogue>
  [[gnu::flatten]] GradientSums piece_sums(const Piece& piece, const T* x, const T* dy, RowScale<A> row,
                                           Epilogue epilogue, A* dweight, A* dbias, A* dthreshold) const {
    const A *weights = s_.weight + piece.channel, *biases = s_.bias + piece.channel;
    const A scale = row.rstd * *weights, bias = *biases, offset = row.offset(s_.problem);
    const auto behind = epilogue.template rows<1, AlongRow>(piece.offset, 0, piece.channel);
    constexpr int chains = Kinks ? 1 : 2;
    Sums<A, Kinks ? 4 : 2, chains> sums;
    for_chains<Wide, chains>(piece.size, [=, &sums](auto lane, int64_t i, int chain) {
      using V = decltype(lane);
      const V number = load<V>(x + i), top = number - splat<V>(offset);
      V grad = load<V>(dy + i);
      if constexpr (Kinks) {
        const V z = Layout::template affine<V>(top, row.rstd, scale, weights, bias, biases, i);
        if constexpr (Epilogue::kStops) {
          const V rest = behind.template stopped<V>(grad, z, 0, i);
          if constexpr (AlongRow)
            store(dthreshold + i, load<V>(dthreshold + i) + rest);
          else
            sums.add(3, chain, rest);
        }
        grad = behind.template gradient<V>(grad, z, 0, i);
        sums.add(2, chain, sign(number - splat<V>(row.mean)));
      }
      if constexpr (AlongRow) {
        const V product = grad * top, weight = load<V>(weights + i);
        sums.add(0, chain, grad * weight);
        sums.add(1, chain, product * weight);
        store(dweight + i, load<V>(dweight + i) + product * splat<V>(row.rstd));
        store(dbias + i, load<V>(dbias + i) + grad);
      } else {
        sums.add(0, chain, grad);
        sums.add(1, chain, grad * top);
      }
    });
    GradientSums found{sums.value(0), sums.value(1), 0, 0};
    if constexpr (Kinks) found.sign = sums.value(2);
    if constexpr (Epilogue::kStops && !AlongRow) found.stopped = sums.value(3);
    return found;
  }

  // P: the exponent, or 0: rstd is 1 and the slope 0 whatever x is, be it a NaN.
  template <bool Stream, bool Kinks, int P, class Epilogue>
  [[gnu::flatten]] void gradient(const Piece& piece, const T* x, const T* dy, RowScale<A> row, RowSlopes<A> slopes,
                                 Epilogue epilogue, T* dx) const {
    const A *weights = s_.weight + piece.channel, *biases = s_.bias + piece.channel;
    const A weight = *weights, scale = row.rstd * weight, bias = *biases;
    const A l1_scale = s_.l1_scale, slope = slopes.slope, shift = slopes.shift, offset = row.offset(s_.problem);
    const auto behind = epilogue.template rows<1, AlongRow>(piece.offset, 0, piece.channel);
    for_lanes_writing<Wide, Stream>(dx, piece.size, [=](auto lane, int64_t i) {
      using V = decltype(lane);
      const V number = load<V>(x + i), centred = number - splat<V>(row.mean);
      V grad = load<V>(dy + i);
      if constexpr (Kinks) {
        const V top = number - splat<V>(offset);
        grad = behind.template gradient<V>(
            grad, Layout::template affine<V>(top, row.rstd, scale, weights, bias, biases, i), 0, i);
        behind.template keep<Stream>(grad, 0, i);
      }
      V result;
      if constexpr (AlongRow)
        result = grad * load<V>(weights + i);
      else
        result = grad * splat<V>(weight);
      if constexpr (P == 2) result = (result - splat<V>(slope) * centred) * splat<V>(row.rstd);
      if constexpr (P == 1) result = result * splat<V>(row.rstd);
      result -= splat<V>(shift);
      if constexpr (Kinks) result += splat<V>(P == 1 ? l1_scale - slope : l1_scale) * sign(centred);
      write<Stream>(dx + i, result);
    });
  }

  const Shared& s_;
  GradientSums* sums_;
};

}  // namespace divnorm::DIVNORM_ISA
