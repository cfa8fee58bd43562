// The same, backward.
#pragma once

#include "runs.h"

namespace divnorm::DIVNORM_ISA {

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
    const SmoothRooms<A>& smooth;
    bool stream;
    A l1_scale;
    A *dweight, *dbias, *dthreshold;  // partial sums: (blocks, affine_size); the last may be null
    double* for_sigma;                // (samples of the maps, groups)
    GradientSums* sums;               // (teams, pieces)
    int64_t pieces;
  };

  BackwardRuns(const Shared& shared, const Member& member)
      : s_(shared), smooth_room_(shared.smooth.of(member.thread)), sums_(shared.sums + member.team * shared.pieces) {}

  void work(const WholeUnit& unit, const Member& member) {
    const Problem& p = s_.problem;
    const Layout& layout = s_.layout;
    const T* x = static_cast<const T*>(s_.tensors.x);
    T* dx = static_cast<T*>(s_.tensors.dx);
    const int64_t row = unit.row(p), pieces = layout.pieces(unit.rows);
    const RowScale<A> scale = given_scale<A>(p, s_.tensors, row);
    const bool given = s_.tensors.part == Part::second;
    const RowSlopes<A> slopes = given ? given_slopes<A>(p, s_.tensors, row) : sum_up(unit, x, scale, member);
    if (s_.tensors.part == Part::first) return;
    smooth_room_.second_look();
    member.share(0, pieces, [&](int64_t from, int64_t to) {
      with_kinks<T>(p, s_.beside, s_.l1_scale != 0, [&](auto epilogue, auto kinks, auto sloped) {
        auto dy = gradients<sloped.value>(Look::second);
        with_exponent<kinks.value>(p, [&](auto exponent) {
          layout.each_piece(unit.rows, from, to, [&](int64_t i, const Piece& piece) {
            T* out = dx + piece.offset;
            const bool stream = s_.stream && (!is_pair<Wide> || reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0);
            const auto rows = layout.rows_from(i, to, stream);
            const auto run = [&](auto stream) {
              gradient<stream.value, kinks.value, exponent.value>(piece, rows, x + piece.offset, dy, scale, slopes,
                                                                  epilogue, out);
            };
            specialize_if<kStreams<T>>(run, stream);
          });
        });
      });
    });
    if (s_.stream) stream_fence();
  }

 private:
  // The first look at a unit: the row's sums and the parameters' gradients, and what the second goes by.
  RowSlopes<A> sum_up(const WholeUnit& unit, const T* x, RowScale<A> scale, const Member& member) {
    const Problem& p = s_.problem;
    const Layout& layout = s_.layout;
    const int64_t row = unit.row(p), pieces = layout.pieces(unit.rows);
    A* dweight = s_.dweight + unit.block * p.affine_size();
    A* dbias = s_.dbias + unit.block * p.affine_size();
    A* dthreshold = s_.dthreshold == nullptr ? nullptr : s_.dthreshold + unit.block * p.affine_size();
    member.sync();
    smooth_room_.first_look();
    member.share(0, pieces, [&](int64_t from, int64_t to) {
      with_kinks<T>(p, s_.beside, s_.l1_scale != 0, [&](auto epilogue, auto kinks, auto sloped) {
        auto dy = gradients<sloped.value>(Look::first);
        layout.each_piece(unit.rows, from, to, [&](int64_t i, const Piece& piece) {
          A *for_weight = dweight + piece.channel, *for_bias = dbias + piece.channel;
          A* for_threshold = dthreshold == nullptr ? nullptr : dthreshold + piece.channel;
          for (A* sums : {for_weight, for_bias, for_threshold})
            if (AlongRow && unit.fresh && sums != nullptr) __builtin_memset(sums, 0, piece.size * sizeof(A));
          sums_[i] = piece_sums<kinks.value>(piece, layout.rows_from(i, to, false), x + piece.offset, dy, scale,
                                             epilogue, for_weight, for_bias, for_threshold);
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
      if (s_.tensors.sums != nullptr) write_sums<A>(p, s_.tensors, row, all);
      if constexpr (!AlongRow) add_planes(unit, scale.rstd, dweight, dbias, dthreshold);
    }
    return slopes;
  }

  template <bool Sloped>
  Gradients<T, Wide, Sloped> gradients(Look look) {
    return {s_.problem, s_.beside, smooth_room_, static_cast<const T*>(s_.tensors.dy), look};
  }

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

  // Of numbers first..first+size of a piece, behind which the rest of its rows is asked for next.
  template <bool Stream, bool Sloped>
  const typename Gradients<T, Wide, Sloped>::G* part_gradients(const Piece& piece, const typename Layout::Rows& rows,
                                                               int64_t first, int64_t size, const T* x, const T* out,
                                                               RowScale<A> row, Gradients<T, Wide, Sloped>& dy) const {
    const int64_t place = piece.channel + (AlongRow ? first : 0);
    const auto normal =
        Layout::normal_rows(x, rows, row.offset(s_.problem), row.rstd, s_.weight + place, s_.bias + place);
    return dy
        .template rows<Stream>(piece.offset + first, 1, rows.count, rows.stride, size,
                               lane_places<Wide, Stream>(out, rows.stride, size), normal)
        .row(0);
  }

  // For a plane without its weight.
  template <Kinks K, class Epilogue, bool Sloped>
  [[gnu::flatten]] GradientSums piece_sums(const Piece& piece, const typename Layout::Rows& rows, const T* x,
                                           Gradients<T, Wide, Sloped>& dy, RowScale<A> row, Epilogue epilogue,
                                           A* dweight, A* dbias, A* dthreshold) const {
    const A *weights = s_.weight + piece.channel, *biases = s_.bias + piece.channel;
    const A scale = row.rstd * *weights, bias = *biases, offset = row.offset(s_.problem);
    const auto behind = epilogue.template rows<1, AlongRow>(piece.offset, 0, piece.channel);
    constexpr bool kSigns = K == Kinks::signs, kMore = kSigns || Epilogue::kStops;
    constexpr int chains = kMore ? 1 : 2;
    Sums<A, kMore ? 4 : 2, chains> sums;
    Layout::each_part(piece, dy.smooth(), [&](int64_t first, int64_t size) {
      const auto* grads = part_gradients<false>(piece, rows, first, size, x + first, x + first, row, dy);
      const auto add = [=, &sums](auto lane, int64_t part, int chain) {
        using V = decltype(lane);
        const int64_t i = first + part;
        const V number = load<V>(x + i), top = number - splat<V>(offset);
        V grad = load<V>(grads + part);
        if constexpr (K != Kinks::none) {
          const V z = Layout::template affine<V>(top, row.rstd, scale, weights, bias, biases, i);
          if constexpr (Epilogue::kStops) {
            const V rest = behind.template stopped<V>(grad, z, 0, i);
            if constexpr (!AlongRow)
              sums.add(3, chain, rest);
            else if (dthreshold != nullptr)
              store(dthreshold + i, load<V>(dthreshold + i) + rest);
          }
          grad = behind.template gradient<V>(grad, z, 0, i);
        }
        if constexpr (kSigns) sums.add(2, chain, sign(number - splat<V>(row.mean)));
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
      };
      for_chains<Wide, chains>(size, add);
    });
    GradientSums found{sums.value(0), sums.value(1), 0, 0};
    if constexpr (kSigns) found.sign = sums.value(2);
    if constexpr (Epilogue::kStops && !AlongRow) found.stopped = sums.value(3);
    return found;
  }

  // P: as with_exponent() has it.
  template <bool Stream, Kinks K, int P, class Epilogue, bool Sloped>
  [[gnu::flatten]] void gradient(const Piece& piece, const typename Layout::Rows& rows, const T* x,
                                 Gradients<T, Wide, Sloped>& dy, RowScale<A> row, RowSlopes<A> slopes,
                                 Epilogue epilogue, T* dx) const {
    const A *weights = s_.weight + piece.channel, *biases = s_.bias + piece.channel;
    const A weight = *weights, scale = row.rstd * weight, bias = *biases;
    const A l1_scale = s_.l1_scale, slope = slopes.slope, shift = slopes.shift, offset = row.offset(s_.problem);
    const auto behind = epilogue.template rows<1, AlongRow>(piece.offset, 0, piece.channel);
    Layout::each_part(piece, dy.smooth(), [&](int64_t first, int64_t size) {
      const auto* grads = part_gradients<Stream>(piece, rows, first, size, x + first, dx + first, row, dy);
      for_lanes_writing<Wide, Stream>(dx + first, size, [=](auto lane, int64_t part) {
        using V = decltype(lane);
        const int64_t i = first + part;
        const V number = load<V>(x + i), centred = number - splat<V>(row.mean);
        V grad = load<V>(grads + part);
        if constexpr (K != Kinks::none) {
          const V top = number - splat<V>(offset);
          const V z = Layout::template affine<V>(top, row.rstd, scale, weights, bias, biases, i);
          grad = behind.template gradient<V>(grad, z, 0, i);
          behind.template keep<Stream>(grad, 0, i);
        }
        V result;
        if constexpr (AlongRow)
          result = grad * load<V>(weights + i);
        else
          result = grad * splat<V>(weight);
        if constexpr (P == 2) result -= splat<V>(slope) * centred;
        result = result * splat<V>(row.rstd) - splat<V>(shift);
        if constexpr (K == Kinks::signs) result += splat<V>(P == 1 ? l1_scale - slope : l1_scale) * sign(centred);
        write<Stream>(dx + i, result);
      });
    });
  }

  const Shared& s_;
  SmoothRoom<A> smooth_room_;
  GradientSums* sums_;
};

}  // namespace divnorm::DIVNORM_ISA
