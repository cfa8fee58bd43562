// Whole fields where a row lies in runs of contiguous numbers: their statistics, and y.
#pragma once

#include "runs.h"

namespace divnorm::DIVNORM_ISA {

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
    const SmoothRooms<A>& smooth;
    const double* sigma;
    bool stream;
    Moments* moments;  // (teams, chunks)
    double* l1;        // (rows, pieces), or null
    int64_t chunks, pieces;
  };

  ForwardRuns(const Shared& shared, const Member& member)
      : s_(shared),
        smooth_room_(shared.smooth.of(member.thread)),
        moments_(shared.moments + member.team * shared.chunks) {}

  void work(const WholeUnit& unit, const Member& member) {
    const Problem& p = s_.problem;
    const T* x = static_cast<const T*>(s_.tensors.x);
    const int64_t row = unit.row(p), pieces = s_.layout.pieces(unit.rows);
    member.sync();
    const bool given = s_.tensors.part == Part::second;
    const RowScale<A> scale = given ? given_scale<A>(p, s_.tensors, row) : statistics(unit, x, member);
    if (s_.tensors.part == Part::first) return;
    double* l1 = s_.l1 == nullptr ? nullptr : s_.l1 + row * s_.pieces;
    member.share(0, pieces, [&](int64_t from, int64_t to) {
      if (is_smooth(p)) return write_smoothly(unit.rows, from, to, x, scale, l1);
      s_.layout.each_piece(unit.rows, from, to, [&](int64_t i, const Piece& piece) {
        write_piece(piece, x, scale, l1 == nullptr ? nullptr : l1 + i);
      });
    });
    if (s_.stream) stream_fence();
  }

 private:
  RowScale<A> statistics(const WholeUnit& unit, const T* x, const Member& member) const {
    const Problem& p = s_.problem;
    const int64_t chunks = s_.layout.chunks(unit.rows);
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
    if (member.rank == 0) write_statistics(p, s_.tensors, unit.row(p), scale, all);
    return scale;
  }

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

  bool streams(const T* y) const {
    return s_.stream && (!is_pair<Wide> || reinterpret_cast<uintptr_t>(y) % kVectorBytes == 0);
  }

  void write_piece(const Piece& piece, const T* x, RowScale<A> scale, double* l1) const {
    T* y = static_cast<T*>(s_.tensors.y) + piece.offset;
    const double sum = with_epilogue<T>(s_.problem, s_.beside, [&](auto epilogue) {
      const auto run = [&](auto stream, auto l1) {
        return normalize<stream.value, l1.value>(piece, x + piece.offset, scale, epilogue, y);
      };
      return specialize_if<kStreams<T>>(run, streams(y), l1 != nullptr);
    });
    if (l1 != nullptr) *l1 = sum;
  }

  // Pieces from..to of a unit, where the epilogue is a smooth activation: rows at once as far as there is room.
  void write_smoothly(const Unit& unit, int64_t from, int64_t to, const T* x, RowScale<A> scale, double* l1) const {
    const SmoothRows<T, Wide> smooth(s_.problem, s_.beside, smooth_room_);
    while (from < to)
      s_.layout.each_piece(unit, from, from + 1, [&](int64_t i, const Piece& piece) {
        T* y = static_cast<T*>(s_.tensors.y) + piece.offset;
        auto rows = s_.layout.rows_from(i, to, streams(y));
        rows.count = smooth.room(smaller(piece.size, kSmoothRun), rows.count);
        const auto run = [&](auto stream, auto with_l1) {
          normalize<stream.value, with_l1.value>(piece, rows, x + piece.offset, scale, smooth, y, l1 + i);
        };
        specialize_if<kStreams<T>>(run, streams(y), l1 != nullptr);
        from += rows.count;
      });
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

  // The same of rows from a piece on, where the epilogue is a smooth activation; l1: one sum a row.
  template <bool Stream, bool L1>
  [[gnu::flatten]] void normalize(const Piece& piece, const typename Layout::Rows& rows, const T* x, RowScale<A> row,
                                  const SmoothRows<T, Wide>& behind, T* y, double* l1) const {
    const A *weights = s_.weight + piece.channel, *biases = s_.bias + piece.channel;
    if constexpr (L1)
      for (int64_t r = 0; r < rows.count; ++r) l1[r] = 0;
    Layout::each_part(piece, true, [&](int64_t first, int64_t size) {
      const int64_t along = AlongRow ? first : 0;
      const auto each = lane_places<Wide, Stream>(y + first, rows.stride, size);
      const A* values = behind.values(
          piece.offset + first, rows.count, rows.stride, size, each,
          Layout::normal_rows(x + first, rows, row.offset(s_.problem), row.rstd, weights + along, biases + along));
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t start = r * rows.stride + first, copy = r * behind.width(size);
        Sums<A, 1, 1> absolutes;
        each(r, [=, &absolutes](auto lane, int64_t place, int64_t i, auto) {
          using V = decltype(lane);
          write<Stream>(y + start + i, load<V>(values + copy + place));
          if constexpr (L1) absolutes.add(0, 0, absolute(load<V>(x + start + i) - splat<V>(row.mean)));
        });
        if constexpr (L1) l1[r] += absolutes.value(0);
      }
    });
  }

  const Shared& s_;
  SmoothRoom<A> smooth_room_;
  Moments* moments_;
};

}  // namespace divnorm::DIVNORM_ISA
