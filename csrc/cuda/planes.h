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
  static __device__ A normalize(const Tile& tile, T* x, const Local<A>& local, const Affine<T>& affine, bool with_l1) {
    A sum = 0;
    with_vectors<T, kVectorBytes>(tile.positions, [&](auto count) {
      constexpr int V = decltype(count)::value;
      with_parameters(affine, [&](auto per_position) {
        using Parameter = OfChannel<A, decltype(per_position)::value>;
        const int vectors = tile.positions / V, threads = device::threads();
        const int slices = vectors < 1 || vectors >= threads ? 1 : threads / vectors;
        for (int i = device::thread(); i < vectors * slices; i += threads) {
          const int slice = i / vectors, p = (i - slice * vectors) * V;
          const Pack<A, V> mean = read_pack<V>(local.mean + p), rstd = read_pack<V>(local.rstd + p);
#pragma unroll 2
          for (int c = slice; c < tile.channels; c += slices)
            sum += normalize_numbers<Parameter>(x, c * tile.positions + p, c, p, mean, rstd, local, affine, with_l1);
        }
      });
    });
    return sum;
  }

  // The same of V numbers at `at` of the tile: of channel c, or of two channels, from position p on.
  template <class Parameter, int V, class Channel>
  static __device__ A normalize_numbers(T* x, int at, const Channel& c, int p, const Pack<A, V>& mean,
                                        const Pack<A, V>& rstd, const Local<A>& local, const Affine<T>& affine,
                                        bool with_l1) {
    A sum = 0;
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
    return sum;
  }

  // Lanes of a warp share neighbouring channels, kChannelsTogether at a time: the fewer lanes the more of them are
  // always at work, and the shorter are the sums over them, as long as there are channels for all. Where channels are
  // few, several warps share them.
  struct Sharing {
    template <class Team>
    __device__ Sharing(int channels_together, const Team& team) {
      const int warps = team.count() / device::kWarp, warp = team.index() / device::kWarp;
      const int sets = (channels_together + kChannelsTogether - 1) / kChannelsTogether;
      const int sharing = sets >= warps || sets < 1 ? 1 : warps / sets;
      while (lanes > kFewestLanes && sets * lanes / 2 >= team.count()) lanes /= 2;
      const int of_warp = device::kWarp / lanes * kChannelsTogether;
      channels = warps / sharing * of_warp;
      first = warp / sharing * of_warp;
      if (first >= channels) first = channels_together;  // those left over find none
      own = team.index() % device::kWarp / lanes * kChannelsTogether;
      position = warp % sharing * device::kWarp + team.index() % lanes;
      positions = sharing * lanes;
      sharer = warp % sharing;
      sharers = sharing;
    }
    static constexpr int kFewestLanes = 16;  // of whose accesses of eight bytes all banks take part
    int lanes = device::kWarp;
    int first, channels;      // the first of this warp's channels, and the step to its next set
    int own;                  // this thread's among them
    int position, positions;  // likewise, in vectors
    int sharer, sharers;      // warps of the same channels
  };

  // dx in place of x, and the residual's gradient in its own; adds to the gradients of the parameters, of each channel
  // once for every warp that shares it. A sweep of sums returns this thread's in place of dx; signs count as l1.
  template <Sweep S = Sweep::gradient>
  static __device__ RowSums<A> differentiate(const Tile& tile, T* x, T* dy, const Local<A>& local,
                                             const Affine<T>& affine, A l1) {
    return differentiate<S>(tile, x, dy, local, affine, l1, Sharing(tile.channels, WholeBlock()), tile.channels);
  }

  // The same where warps share channels in another way; `pitch`: from one sharer's gradients to the next's.
  template <Sweep S>
  static __device__ RowSums<A> differentiate(const Tile& tile, T* x, T* dy, const Local<A>& local,
                                             const Affine<T>& affine, A l1, const Sharing& sharing, int pitch) {
    RowSums<A> of_row;
    with_vectors<T, kColumnBytes>(tile.positions, [&](auto count) {
      constexpr int V = decltype(count)::value;
      with_parameters(affine, [&](auto per_position) {
        using Parameter = OfChannel<A, decltype(per_position)::value>;
        const auto to_dy = static_cast<int>(dy - x);  // one address serves both
        for (int of_warp = sharing.first; of_warp < tile.channels; of_warp += sharing.channels) {
          const int first = of_warp + sharing.own, end = first < tile.channels ? tile.positions : 0;
          A dweight[kChannelsTogether] = {}, dbias[kChannelsTogether] = {}, dthreshold[kChannelsTogether] = {};
          for (int p = sharing.position * V; p < end; p += sharing.positions * V) {
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
            A sums[2 * kChannelsTogether];
            for (int k = 0; k < kChannelsTogether; ++k) {
              sums[k] = dweight[k];
              sums[kChannelsTogether + k] = dbias[k];
            }
            const auto add = [&](A* gradients, int k, A sum) {
              if (first + k < tile.channels) gradients[sharing.sharer * pitch + first + k] += sum;
            };
            const int mine = sum_over_lanes(sharing.lanes, sums);
            if (mine >= 0)
              add(mine < kChannelsTogether ? affine.dweight : affine.dbias, mine % kChannelsTogether, sums[0]);
            if (affine.dthreshold != nullptr) {
              const int of_threshold = sum_over_lanes(sharing.lanes, dthreshold);
              if (of_threshold >= 0) add(affine.dthreshold, of_threshold, dthreshold[0]);
            }
          }
        }
      });
    });
    return of_row;
  }

  // How many numbers differentiate() keeps of a channel's gradients.
  static __device__ int sharers(const Tile& tile) { return Sharing(tile.channels, WholeBlock()).sharers; }

 private:
  // Sums Count numbers, a power of two, over `lanes` lanes, which hand each other halves of what they hold. Returns
  // which number's sum this lane then has in front, -1: none.
  template <int Count>
  static __device__ int sum_over_lanes(int lanes, A (&numbers)[Count]) {
    const int lane = device::thread();
    int mask = lanes / 2, which = 0;
#pragma unroll
    for (int half = Count / 2; half > 0; half /= 2, mask /= 2) {
      const bool upper = (lane & mask) != 0;
      which = 2 * which + upper;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const A kept = upper ? numbers[i + half] : numbers[i], given = upper ? numbers[i] : numbers[i + half];
        numbers[i] = kept + device::shuffle_xor(given, mask);
      }
    }
    const int same = 2 * mask - 1;  // lanes with the same number
    for (; mask > 0; mask /= 2) numbers[0] += device::shuffle_xor(numbers[0], mask);
    return (lane & same) == 0 ? which : -1;
  }
};

}  // namespace divnorm::cuda
