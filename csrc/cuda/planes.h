// The work on a tile of a contiguous tensor: planes of positions, one for each channel.
#pragma once

#include "tile.h"

namespace divnorm::cuda {

template <class T>
struct Planes {
  using A = Acc<T>;

  // Mean and sum of squares about it of every position, for each of `slices` slices of the channels: channel c is in
  // slice c % slices. Not centred: the squares are about 0. partial: (2, slices, pitch).
  static __device__ void moments(const Tile& tile, const T* x, bool centred, int slices, A* partial, int pitch) {
    with_vectors<T, kWordBytes>(tile.positions, [&](auto count) {
      constexpr int V = decltype(count)::value;
      const int vectors = tile.positions / V;
      for (int i = device::thread(); i < vectors * slices; i += device::threads()) {
        const int slice = i / vectors, p = (i - slice * vectors) * V;
        const A each = A(1) / static_cast<A>((tile.channels - slice + slices - 1) / slices);
        A mean[V] = {}, rest[V] = {}, squares[V] = {};
        if (centred) {
#pragma unroll 4
          for (int c = slice; c < tile.channels; c += slices) {
            const Pack<T, V> value = read_pack<V>(x + c * tile.positions + p);
            for (int v = 0; v < V; ++v) mean[v] += widen(value.at[v]);
          }
          for (int v = 0; v < V; ++v) mean[v] = slice < tile.channels ? mean[v] * each : A(0);
        }
#pragma unroll 4
        for (int c = slice; c < tile.channels; c += slices) {
          const Pack<T, V> value = read_pack<V>(x + c * tile.positions + p);
          for (int v = 0; v < V; ++v) {
            const A difference = widen(value.at[v]) - mean[v];
            rest[v] += difference;
            squares[v] += difference * difference;
          }
        }
        for (int v = 0; v < V; ++v) {
          partial[slice * pitch + p + v] =
              centred && slice < tile.channels ? corrected(mean[v], rest[v] * each) : mean[v];
          partial[(slices + slice) * pitch + p + v] = squares[v];
        }
      }
    });
  }

  // P2 = sum of g v, P1 rstd + l1's share, and V = sum of v, of each slice of the channels. partial: (3, slices,
  // pitch).
  static __device__ void sums(const Tile& tile, const T* x, const T* dy, const Local<A>& local, const Affine<A>& affine,
                              A l1, int slices, A* partial, int pitch) {
    with_vectors<T, kWordBytes>(tile.positions, [&](auto count) {
      constexpr int V = decltype(count)::value;
      const int vectors = tile.positions / V;
      for (int i = device::thread(); i < vectors * slices; i += device::threads()) {
        const int slice = i / vectors, p = (i - slice * vectors) * V;
        A scale[V] = {}, shift[V] = {}, centred[V] = {}, mean[V], rstd[V];
        for (int v = 0; v < V; ++v) mean[v] = local.mean[p + v], rstd[v] = local.rstd[p + v];
#pragma unroll 2
        for (int c = slice; c < tile.channels; c += slices) {
          const Pack<T, V> value = read_pack<V>(x + c * tile.positions + p);
          const Pack<T, V> gradient = read_pack<V>(dy + c * tile.positions + p);
          for (int v = 0; v < V; ++v) {
            const int parameter = affine.per_position ? p + v : c;
            const A deviation = widen(value.at[v]) - mean[v];
            const A upstream = affine.passed(widen(gradient.at[v]), deviation, rstd[v], parameter);
            const A g = upstream * affine.weight[parameter];
            scale[v] += g * deviation;
            shift[v] += g * rstd[v] + signed_as(l1, deviation);
            centred[v] += deviation;
          }
        }
        for (int v = 0; v < V; ++v) {
          partial[slice * pitch + p + v] = scale[v];
          partial[(slices + slice) * pitch + p + v] = shift[v];
          partial[(2 * slices + slice) * pitch + p + v] = centred[v];
        }
      }
    });
  }

  // y in place of x; returns this thread's sum of |v|.
  static __device__ A normalize(const Tile& tile, T* x, const Local<A>& local, const Affine<A>& affine) {
    A sum = 0;
    with_vectors<T, kVectorBytes>(tile.positions, [&](auto count) {
      constexpr int V = decltype(count)::value;
      const Warps warps(tile);
      for (int c = warps.channel; c < tile.channels; c += warps.channels) {
        for (int p = warps.position * V; p < tile.positions; p += warps.positions * V) {
          Pack<T, V> value = read_pack<V>(x + c * tile.positions + p);
          const Pack<A, V> mean = read_pack<V>(local.mean + p), rstd = read_pack<V>(local.rstd + p);
          for (int v = 0; v < V; ++v) {
            const int parameter = affine.per_position ? p + v : c;
            const A deviation = widen(value.at[v]) - mean.at[v];
            sum += std::abs(deviation);
            const A y = deviation * rstd.at[v] * affine.weight[parameter] + affine.bias[parameter];
            value.at[v] = narrow<T>(affine.rectified(y));
          }
          write_pack(x + c * tile.positions + p, value);
        }
      }
    });
    return sum;
  }

  // dx in place of x; adds to the gradients of weight and bias, of each channel once for every warp that shares it.
  static __device__ void differentiate(const Tile& tile, T* x, T* dy, const Local<A>& local, const Affine<A>& affine,
                                       A l1) {
    with_vectors<T, kColumnBytes>(tile.positions, [&](auto count) {
      constexpr int V = decltype(count)::value;
      const Warps warps(tile);
      for (int c = warps.channel; c < tile.channels; c += warps.channels) {
        A dweight = 0, dbias = 0;
        for (int p = warps.position * V; p < tile.positions; p += warps.positions * V) {
          Pack<T, V> value = read_pack<V>(x + c * tile.positions + p);
          const Pack<T, V> gradient = read_pack<V>(dy + c * tile.positions + p);
          const Pack<A, V> mean = read_pack<V>(local.mean + p), rstd = read_pack<V>(local.rstd + p);
          const Pack<A, V> slope = read_pack<V>(local.slope + p), offset = read_pack<V>(local.offset + p);
          for (int v = 0; v < V; ++v) {
            const int parameter = affine.per_position ? p + v : c;
            const A deviation = widen(value.at[v]) - mean.at[v];
            const A upstream = affine.passed(widen(gradient.at[v]), deviation, rstd.at[v], parameter);
            const A g = upstream * affine.weight[parameter];
            value.at[v] = narrow<T>(g * rstd.at[v] + signed_as(l1, deviation) - slope.at[v] * deviation - offset.at[v]);
            if (affine.per_position && affine.dweight != nullptr) {
              affine.dweight[p + v] += upstream * deviation * rstd.at[v];
              affine.dbias[p + v] += upstream;
            } else {
              dweight += upstream * deviation * rstd.at[v];
              dbias += upstream;
            }
          }
          write_pack(x + c * tile.positions + p, value);
        }
        if (affine.per_position || affine.dweight == nullptr) continue;
        for (int m = device::kWarp / 2; m > 0; m /= 2) {
          dweight += device::shuffle_xor(dweight, m);
          dbias += device::shuffle_xor(dbias, m);
        }
        if (device::thread() % device::kWarp == 0) {
          const int at = warps.position / device::kWarp * tile.channels + c;
          affine.dweight[at] += dweight;
          affine.dbias[at] += dbias;
        }
      }
    });
  }

  // How many numbers differentiate() keeps of a channel's gradients.
  static __device__ int sharers(const Tile& tile) { return Warps(tile).positions / device::kWarp; }

 private:
  // Warps take a channel each; where channels are fewer, several share one.
  struct Warps {
    __device__ explicit Warps(const Tile& tile) {
      const int warps = device::threads() / device::kWarp, warp = device::thread() / device::kWarp;
      const int sharing = tile.channels >= warps || tile.channels < 1 ? 1 : warps / tile.channels;
      channels = warps / sharing;
      positions = sharing * device::kWarp;
      channel = warp / sharing;  // those left over find none
      if (channel >= channels) channel = tile.channels;
      position = warp % sharing * device::kWarp + device::thread() % device::kWarp;
    }
    int channel, channels;    // the first of this thread's, and the step to its next
    int position, positions;  // likewise, in vectors
  };
};

}  // namespace divnorm::cuda
