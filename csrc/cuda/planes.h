// The work on a tile of a contiguous tensor: planes of positions, one for each channel.
#pragma once

#include "channel_sums.h"

namespace divnorm::cuda {

template <class T, Form F>
struct Planes {
  using A = Acc<T>;

  // Mean and sum of squares about it of every position, for each slice of the channels. Not centred: the squares are
  // about 0. partial: (2, slices, pitch).
  static __device__ void moments(const Tile& tile, const T* x, bool centred, const Slices& slices, A* partial,
                                 int pitch) {
    with_vectors<T, kColumnBytes>(tile.positions, [&](auto count) {
      constexpr int V = decltype(count)::value;
      const int vectors = tile.positions / V, step = slices.count * tile.positions;
      for (int i = device::thread(); i < vectors * slices.count; i += device::threads()) {
        const int slice = i / vectors, p = (i - slice * vectors) * V;
        const int channels = slice_channels(tile.channels, slice, slices);
        const A each = A(1) / static_cast<A>(channels);
        const T* const column = x + slice * tile.positions + p;
        Pack<A, V> mean = {}, rest = {}, squares = {};
        if (centred && channels > 0) {
#pragma unroll 4
          for (int c = 0; c < channels; ++c) {
            const Pack<A, V> value = widen(read_pack<V>(column + c * step));
            for (int v = 0; v < V; ++v) mean.at[v] += value.at[v];
          }
          for (int v = 0; v < V; ++v) mean.at[v] *= each;
        }
#pragma unroll 4
        for (int c = 0; c < channels; ++c) {
          const Pack<A, V> value = widen(read_pack<V>(column + c * step));
          for (int v = 0; v < V; ++v) {
            const A difference = value.at[v] - mean.at[v];
            rest.at[v] += difference;
            squares.at[v] += difference * difference;
          }
        }
        if (centred && channels > 0)
          for (int v = 0; v < V; ++v) mean.at[v] = corrected(mean.at[v], rest.at[v] * each);
        write_pack(partial + slice * pitch + p, mean);
        write_pack(partial + (slices.count + slice) * pitch + p, squares);
      }
    });
  }

  // The sum of |v| of every position, for each slice of the channels. partial: (slices, pitch).
  static __device__ void deviations(const Tile& tile, const T* x, const A* means, const Slices& slices, A* partial,
                                    int pitch) {
    with_vectors<T, kColumnBytes>(tile.positions, [&](auto count) {
      constexpr int V = decltype(count)::value;
      const int vectors = tile.positions / V;
      for (int i = device::thread(); i < vectors * slices.count; i += device::threads()) {
        const int slice = i / vectors, p = (i - slice * vectors) * V;
        const Pack<A, V> mean = read_pack<V>(means + p);
        Pack<A, V> sum = {};
#pragma unroll 4
        for (int c = slice; c < tile.channels; c += slices.count) {
          const Pack<A, V> number = widen(read_pack<V>(x + c * tile.positions + p));
          for (int v = 0; v < V; ++v) sum.at[v] += std::abs(number.at[v] - mean.at[v]);
        }
        write_pack(partial + slice * pitch + p, sum);
      }
    });
  }

  // ChannelSums of each slice of the channels. partial: (3, slices, pitch).
  static __device__ void sums(const Tile& tile, const T* x, const T* dy, const Local<A>& local, const Affine<T>& affine,
                              A l1, const Slices& slices, A* partial, int pitch) {
    with_vectors<T, kColumnBytes>(tile.positions, [&](auto count) {
      constexpr int V = decltype(count)::value;
      with_parameters(affine, [&](auto per_position) {
        using Parameter = OfChannel<A, decltype(per_position)::value>;
        const int vectors = tile.positions / V;
        for (int i = device::thread(); i < vectors * slices.count; i += device::threads()) {
          const int slice = i / vectors, p = (i - slice * vectors) * V;
          const Pack<A, V> mean = read_pack<V>(local.mean + p), rstd = read_pack<V>(local.rstd + p);
          ChannelSums<A, V> sums;
#pragma unroll 2
          for (int c = slice; c < tile.channels; c += slices.count)
            sums.template add<F, Parameter, V>(x, dy, c * tile.positions + p, c, p, mean, rstd, local, affine, l1);
          write_pack(partial + slice * pitch + p, packed<V>(sums.scale));
          write_pack(partial + (slices.count + slice) * pitch + p, packed<V>(sums.shift));
          write_pack(partial + (2 * slices.count + slice) * pitch + p, packed<V>(sums.centred));
        }
      });
    });
  }

  // y in place of x; returns this thread's sum of |v| where it is wanted.
  template <class Team = WholeBlock>
  static __device__ A normalize(const Tile& tile, T* x, const Local<A>& local, const Affine<T>& affine, bool with_l1,
                                const Team& team = {}) {
    A sum = 0;
    with_vectors<T, kVectorBytes>(tile.positions, [&](auto count) {
      constexpr int V = decltype(count)::value;
      with_parameters(affine, [&](auto per_position) {
        using Parameter = OfChannel<A, decltype(per_position)::value>;
        const int vectors = tile.positions / V;
        const int slices = vectors < 1 || vectors >= team.count() ? 1 : team.count() / vectors;
        for (int i = team.index(); i < vectors * slices; i += team.count()) {
          const int slice = i / vectors, p = (i - slice * vectors) * V;
          const Pack<A, V> mean = read_pack<V>(local.mean + p), rstd = read_pack<V>(local.rstd + p);
#pragma unroll 2
          for (int c = slice; c < tile.channels; c += slices) {
            const int at = c * tile.positions + p;
            const Pack<A, V> number = widen(read_pack<V>(x + at));
            const Pack<A, V> weight = Parameter(affine.weight, c).template at<V>(p);
            const Pack<A, V> bias = Parameter(affine.bias, c).template at<V>(p);
            Pack<A, V> value;
            for (int v = 0; v < V; ++v) value.at[v] = number.at[v] - mean.at[v];
            if (with_l1)
              for (int v = 0; v < V; ++v) sum += std::abs(value.at[v]);
            value = numerator<F>(local, number, value);
            for (int v = 0; v < V; ++v) value.at[v] = value.at[v] * rstd.at[v] * weight.at[v] + bias.at[v];
            add_residual<F>(affine, at, value);
            activate<F>(affine.activation, value, [&] { return Parameter(affine.threshold, c).template at<V>(p); });
            write_pack(x + at, narrow<T>(value));
          }
        }
      });
    });
    return sum;
  }

  // dx in place of x, and the residual's gradient in its own; adds to the gradients of the parameters, of each channel
  // once for every warp that shares it. A sweep of sums returns this thread's in place of dx; signs count as l1.
  template <Sweep S = Sweep::gradient>
  static __device__ RowSums<A> differentiate(const Tile& tile, T* x, T* dy, const Local<A>& local,
                                             const Affine<T>& affine, A l1) {
    return differentiate<S>(tile, x, dy, local, affine, l1, tile.channels, tile.channels, WholeBlock());
  }

  // The same where warps share channels as of `together` channels; `pitch`: from one sharer's gradients to the next's.
  template <Sweep S, class Team>
  static __device__ RowSums<A> differentiate(const Tile& tile, T* x, T* dy, const Local<A>& local,
                                             const Affine<T>& affine, A l1, int together, int pitch, const Team& team) {
    RowSums<A> of_row;
    with_vectors<T, kColumnBytes>(tile.positions, [&](auto count) {
      constexpr int V = decltype(count)::value;
      with_parameters(affine, [&](auto per_position) {
        using Parameter = OfChannel<A, decltype(per_position)::value>;
        const Warps warps(together, team);
        const auto to_dy = static_cast<int>(dy - x);  // one address serves both
        for (int first = warps.channel; first < tile.channels; first += warps.channels) {
          A dweight[kChannelsTogether] = {}, dbias[kChannelsTogether] = {}, dthreshold[kChannelsTogether] = {};
          for (int p = warps.position * V; p < tile.positions; p += warps.positions * V) {
            const Pack<A, V> mean = read_pack<V>(local.mean + p), rstd = read_pack<V>(local.rstd + p);
            Pack<A, V> slope, offset;
            if constexpr (S == Sweep::gradient) {
              slope = read_pack<V>(local.slope + p);
              offset = read_pack<V>(local.offset + p);
            }
            T* at = x + first * tile.positions + p;
#pragma unroll
            for (int k = 0; k < kChannelsTogether; ++k, at += tile.positions) {
              if (first + k >= tile.channels) break;
              const Pack<A, V> number = widen(read_pack<V>(at));
              Pack<A, V> upstream = widen(read_pack<V>(at + to_dy));
              const Pack<A, V> weight = Parameter(affine.weight + first, k).template at<V>(p);
              Pack<A, V> value, normal, stopped = {}, dx;
              for (int v = 0; v < V; ++v) value.at[v] = number.at[v] - mean.at[v];
              const Pack<A, V> over = numerator<F>(local, number, value);
              for (int v = 0; v < V; ++v) normal.at[v] = over.at[v] * rstd.at[v];
              if (affine.activation != Activation::none) {
                Pack<A, V> z = Parameter(affine.bias + first, k).template at<V>(p);
                for (int v = 0; v < V; ++v) z.at[v] += normal.at[v] * weight.at[v];
                add_residual<F>(affine, static_cast<int>(at - x), z);
                stopped = pass_back<F>(affine.activation, z, upstream,
                                       [&] { return Parameter(affine.threshold + first, k).template at<V>(p); });
                if constexpr (S == Sweep::gradient) leave_gradient<F>(affine, static_cast<int>(at - x), upstream);
              }
              for (int v = 0; v < V; ++v) {
                if constexpr (!Parameter::kPerPosition) {
                  dweight[k] += upstream.at[v] * normal.at[v];
                  dbias[k] += upstream.at[v];
                  dthreshold[k] += stopped.at[v];
                } else if (affine.dweight != nullptr) {
                  affine.dweight[p + v] += upstream.at[v] * normal.at[v];
                  affine.dbias[p + v] += upstream.at[v];
                  if (affine.dthreshold != nullptr) affine.dthreshold[p + v] += stopped.at[v];
                }
              }
              if constexpr (S == Sweep::sums) {
                of_row.add(upstream, weight, over);
                if (l1 != A(0))
                  for (int v = 0; v < V; ++v) of_row.signs += signed_as(l1, value.at[v]);
              } else {
                for (int v = 0; v < V; ++v) dx.at[v] = upstream.at[v] * weight.at[v] * rstd.at[v] - offset.at[v];
                subtract_slope<F>(local.slope_of, slope, value, rstd, dx);
                if (l1 != A(0))
                  for (int v = 0; v < V; ++v) dx.at[v] += signed_as(l1, value.at[v]);
                write_pack(at, narrow<T>(dx));
              }
            }
          }
          if constexpr (!Parameter::kPerPosition) {
            if (affine.dweight == nullptr) continue;
#pragma unroll
            for (int k = 0; k < kChannelsTogether; ++k) {
              const int c = first + k;
              if (c >= tile.channels) break;
              for (int m = device::kWarp / 2; m > 0; m /= 2) {
                dweight[k] += device::shuffle_xor(dweight[k], m);
                dbias[k] += device::shuffle_xor(dbias[k], m);
                if (affine.dthreshold != nullptr) dthreshold[k] += device::shuffle_xor(dthreshold[k], m);
              }
              if (team.index() % device::kWarp == 0) {
                const int at = warps.position / device::kWarp * pitch + c;
                affine.dweight[at] += dweight[k];
                affine.dbias[at] += dbias[k];
                if (affine.dthreshold != nullptr) affine.dthreshold[at] += dthreshold[k];
              }
            }
          }
        }
      });
    });
    return of_row;
  }

  // How many numbers differentiate() keeps of a channel's gradients.
  static __device__ int sharers(const Tile& tile) { return sharers(tile.channels, WholeBlock()); }
  template <class Team>
  static __device__ int sharers(int channels, const Team& team) {
    return Warps(channels, team).positions / device::kWarp;
  }

 private:
  // Warps take channels, several neighbours at a time; where channels are few, several warps share them.
  struct Warps {
    template <class Team>
    __device__ Warps(int channels_together, const Team& team) {
      const int warps = team.count() / device::kWarp, warp = team.index() / device::kWarp;
      const int sets = (channels_together + kChannelsTogether - 1) / kChannelsTogether;
      const int sharing = sets >= warps || sets < 1 ? 1 : warps / sets;
      channels = warps / sharing * kChannelsTogether;
      positions = sharing * device::kWarp;
      channel = warp / sharing * kChannelsTogether;
      if (channel >= channels) channel = channels_together;  // those left over find none
      position = warp % sharing * device::kWarp + team.index() % device::kWarp;
    }
    int channel, channels;    // the first of this thread's, and the step to its next
    int position, positions;  // likewise, in vectors
  };
};

}  // namespace divnorm::cuda
