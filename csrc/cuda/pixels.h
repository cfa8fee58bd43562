// The work on a tile of a channels_last tensor: positions, each with its channels side by side.
#pragma once

#include "tile.h"

namespace divnorm::cuda {

template <class T, Form F>
struct Pixels {
  using A = Acc<T>;

  // Lanes of a warp share a position: as few as read kFewestBytes side by side, half of the banks of shared memory, for
  // adding them up costs; more where each still has kVectors vectors.
  struct Lanes {
    template <class Team>
    __device__ Lanes(int channels, const Team& team) {
      with_vectors<T, kVectorBytes>(channels, [&](auto vector) {
        constexpr int V = decltype(vector)::value;
        const auto wanted = [&](int lanes) {
          return lanes * V * static_cast<int>(sizeof(T)) <= kFewestBytes || lanes * V * kVectors <= channels;
        };
        while (count < device::kWarp && count * 2 * V <= channels && wanted(count * 2)) count *= 2;
      });
      lane = team.index() % count;
      position = team.index() / count;
      positions = team.count() / count;
    }
    // Each value becomes the sum of those of the position's lanes.
    template <class... Values>
    __device__ void add_up(Values&... values) const {
      for (int m = count / 2; m > 0; m /= 2) ((values += device::shuffle_xor(values, m)), ...);
    }
    static constexpr int kFewestBytes = 64, kVectors = 4;
    int count = 1, lane, position, positions;
  };

  // A thread keeps to its channels, so many bytes of them together, and goes through positions with the other workers
  // of these.
  template <int Bytes>
  struct Columns {
    template <class Team>
    __device__ Columns(int channels, const Team& team) {
      with_vectors<T, Bytes>(channels, [&](auto count) {
        const int vectors = channels / decltype(count)::value;
        workers = vectors < 1 || vectors >= team.count() ? 1 : team.count() / vectors;
        worker = workers == 1 ? 0 : team.index() / vectors;
        first = workers == 1 ? team.index() : team.index() % vectors;
        step = workers == 1 ? team.count() : vectors;
        if (worker >= workers) first = vectors;  // left over
      });
    }
    int workers, worker, first, step;
  };

  // As Planes::moments; a block has all channels of its positions, in one slice.
  static __device__ void moments(const Tile& tile, const T* x, bool centred, const Slices&, A* partial, int pitch) {
    moments(tile, x, centred, partial, pitch, Lanes(tile.channels, WholeBlock()));
  }
  static __device__ void moments(const Tile& tile, const T* x, bool centred, A* partial, int pitch,
                                 const Lanes& lanes) {
    with_vectors<T, kVectorBytes>(tile.channels, [&](auto count) {
      constexpr int V = decltype(count)::value;
      const A each = A(1) / static_cast<A>(tile.channels);
      const int together = lanes.count * V < tile.channels ? lanes.count * V : tile.channels;
      const A each_together = A(1) / static_cast<A>(together);
      for (int first = 0; first < tile.positions; first += lanes.positions) {
        const int p = first + lanes.position;
        const T* channels = x + p * tile.channels;
        const int end = p < tile.positions ? tile.channels : 0, begin = lanes.lane * V;
        // About the mean of what the lanes take first: no more than a few bits of the squares cancel.
        A pivot = 0, rest = 0, squares = 0;
        if (centred) {
          if (begin < end) {
            const Pack<A, V> value = widen(read_pack<V>(channels + begin));
            for (int v = 0; v < V; ++v) pivot += value.at[v];
          }
          lanes.add_up(pivot);
          pivot = finite(pivot) ? pivot * each_together : A(0);
        }
        for (int c = begin; c < end; c += lanes.count * V) {
          const Pack<A, V> value = widen(read_pack<V>(channels + c));
          for (int v = 0; v < V; ++v) {
            const A difference = value.at[v] - pivot;
            rest += difference;
            squares += difference * difference;
          }
        }
        lanes.add_up(rest, squares);
        if (end > 0 && lanes.lane == 0) {
          const A on = rest * each;
          partial[p] = centred ? pivot + on : A(0);
          partial[pitch + p] = centred ? squares_about_mean(squares, rest, on) : squares;
        }
      }
    });
  }

  // As Planes::deviations, in one slice.
  static __device__ void deviations(const Tile& tile, const T* x, const A* means, const Slices&, A* partial, int) {
    with_vectors<T, kVectorBytes>(tile.channels, [&](auto count) {
      constexpr int V = decltype(count)::value;
      const Lanes lanes(tile.channels, WholeBlock());
      for (int first = 0; first < tile.positions; first += lanes.positions) {
        const int p = first + lanes.position;
        const int end = p < tile.positions ? tile.channels : 0;
        const A mean = end > 0 ? means[p] : A(0);
        A sum = 0;
        for (int c = lanes.lane * V; c < end; c += lanes.count * V) {
          const Pack<A, V> number = widen(read_pack<V>(x + p * tile.channels + c));
          for (int v = 0; v < V; ++v) sum += std::abs(number.at[v] - mean);
        }
        lanes.add_up(sum);
        if (end > 0 && lanes.lane == 0) partial[p] = sum;
      }
    });
  }

  // As Planes::sums, in one slice.
  static __device__ void sums(const Tile& tile, const T* x, const T* dy, const Local<A>& local, const Affine<T>& affine,
                              A l1, const Slices&, A* partial, int pitch) {
    sums(tile, x, dy, local, affine, l1, partial, pitch, Lanes(tile.channels, WholeBlock()));
  }
  static __device__ void sums(const Tile& tile, const T* x, const T* dy, const Local<A>& local, const Affine<T>& affine,
                              A l1, A* partial, int pitch, const Lanes& lanes) {
    with_vectors<T, kVectorBytes>(tile.channels, [&](auto count) {
      constexpr int V = decltype(count)::value;
      for (int first = 0; first < tile.positions; first += lanes.positions) {
        const int p = first + lanes.position;
        const int end = p < tile.positions ? tile.channels : 0;
        const A mean = end > 0 ? local.mean[p] : A(0), rstd = end > 0 ? local.rstd[p] : A(0);
        A scale = 0, shift = 0, centred = 0;
        for (int c = lanes.lane * V; c < end; c += lanes.count * V) {
          const int at = p * tile.channels + c;
          const Pack<A, V> number = widen(read_pack<V>(x + at));
          Pack<A, V> upstream = widen(read_pack<V>(dy + at));
          Pack<A, V> weight = read_pack<V>(affine.weight + c);
          Pack<A, V> value;
          for (int v = 0; v < V; ++v) value.at[v] = number.at[v] - mean;
          const Pack<A, V> over = numerator<F>(local, number, value);
          if (affine.activation != Activation::none) {
            Pack<A, V> z = read_pack<V>(affine.bias + c);
            for (int v = 0; v < V; ++v) z.at[v] += over.at[v] * rstd * weight.at[v];
            add_residual<F>(affine, at, z);
            pass_back<F>(affine.activation, z, upstream, [&] { return read_pack<V>(affine.threshold + c); });
            device::forget();  // or the weights would keep registers that a slope takes
            weight = read_pack<V>(affine.weight + c);
          }
          for (int v = 0; v < V; ++v) {
            const A g = upstream.at[v] * weight.at[v];
            scale += g * over.at[v];
            if (F == Form::plain || !local.keeps_mean) shift += g * rstd;
            centred += F == Form::general && local.absolute ? signed_as(A(1), value.at[v]) : value.at[v];
          }
          if (l1 != A(0))
            for (int v = 0; v < V; ++v) shift += signed_as(l1, value.at[v]);
        }
        lanes.add_up(scale, shift, centred);
        if (end > 0 && lanes.lane == 0) {
          partial[p] = scale;
          partial[pitch + p] = shift;
          partial[2 * pitch + p] = centred;
        }
      }
    });
  }

  // As Planes::normalize.
  static __device__ A normalize(const Tile& tile, T* x, const Local<A>& local, const Affine<T>& affine, bool with_l1) {
    return normalize(tile, x, local, affine, with_l1, Columns<kVectorBytes>(tile.channels, WholeBlock()));
  }
  static __device__ A normalize(const Tile& tile, T* x, const Local<A>& local, const Affine<T>& affine, bool with_l1,
                                const Columns<kVectorBytes>& columns) {
    A sum = 0;
    with_vectors<T, kVectorBytes>(tile.channels, [&](auto count) {
      constexpr int V = decltype(count)::value;
      for (int c = columns.first * V; c < tile.channels; c += columns.step * V) {
        const Pack<A, V> weight = read_pack<V>(affine.weight + c), bias = read_pack<V>(affine.bias + c);
        for (int p = columns.worker; p < tile.positions; p += columns.workers) {
          const int at = p * tile.channels + c;
          const Pack<A, V> number = widen(read_pack<V>(x + at));
          const A mean = local.mean[p], rstd = local.rstd[p];
          Pack<A, V> value;
          for (int v = 0; v < V; ++v) value.at[v] = number.at[v] - mean;
          if (with_l1)
            for (int v = 0; v < V; ++v) sum += std::abs(value.at[v]);
          value = numerator<F>(local, number, value);
          for (int v = 0; v < V; ++v) value.at[v] = value.at[v] * rstd * weight.at[v] + bias.at[v];
          add_residual<F>(affine, at, value);
          activate<F>(affine.activation, value, [&] { return read_pack<V>(affine.threshold + c); });
          write_pack(x + at, narrow<T>(value));
        }
      }
    });
    return sum;
  }

  // The gradients of the parameters of a thread's channels, so far.
  struct Gradients {
    static constexpr int kMost = kColumnBytes < sizeof(T) ? 1 : kColumnBytes / sizeof(T);
    A dweight[kMost] = {}, dbias[kMost] = {}, dthreshold[kMost] = {};
  };

  // As Planes::differentiate. dy's place is used for sums once it has been read.
  template <Sweep S = Sweep::gradient>
  static __device__ RowSums<A> differentiate(const Tile& tile, T* x, T* dy, const Local<A>& local,
                                             const Affine<T>& affine, A l1) {
    const Columns<kColumnBytes> columns(tile.channels, WholeBlock());
    Gradients gradients;
    const RowSums<A> of_row = differentiate<S>(tile, x, dy, local, affine, l1, gradients, columns);
    collect(tile.channels, affine, gradients, reinterpret_cast<A*>(dy), columns, WholeBlock());
    return of_row;
  }

  // The same, of which the gradients of the parameters stay with the threads where each has channels of its own.
  template <Sweep S>
  static __device__ RowSums<A> differentiate(const Tile& tile, T* x, T* dy, const Local<A>& local,
                                             const Affine<T>& affine, A l1, Gradients& gradients,
                                             const Columns<kColumnBytes>& columns) {
    RowSums<A> of_row;
    with_vectors<T, kColumnBytes>(tile.channels, [&](auto count) {
      constexpr int V = decltype(count)::value;
      for (int c = columns.first * V; c < tile.channels; c += columns.step * V) {
        const Pack<A, V> weight = read_pack<V>(affine.weight + c);
        for (int p = columns.worker; p < tile.positions; p += columns.workers) {
          const int at = p * tile.channels + c;
          const Pack<A, V> number = widen(read_pack<V>(x + at));
          Pack<A, V> upstream = widen(read_pack<V>(dy + at));
          const A mean = local.mean[p], rstd = local.rstd[p];
          const A offset = S == Sweep::gradient ? local.offset[p] : A(0);
          Pack<A, V> value, normal, stopped = {}, dx;
          for (int v = 0; v < V; ++v) value.at[v] = number.at[v] - mean;
          const Pack<A, V> over = numerator<F>(local, number, value);
          for (int v = 0; v < V; ++v) normal.at[v] = over.at[v] * rstd;
          if (affine.activation != Activation::none) {
            Pack<A, V> z = read_pack<V>(affine.bias + c);  // not kept from pixel to pixel: registers are full
            for (int v = 0; v < V; ++v) z.at[v] += normal.at[v] * weight.at[v];
            add_residual<F>(affine, at, z);
            stopped = pass_back<F>(affine.activation, z, upstream, [&] { return read_pack<V>(affine.threshold + c); });
            if constexpr (S == Sweep::gradient) leave_gradient<F>(affine, at, upstream);
          }
          if constexpr (S == Sweep::sums) {
            of_row.add(upstream, weight, over);
            if (l1 != A(0))
              for (int v = 0; v < V; ++v) of_row.signs += signed_as(l1, value.at[v]);
          } else {
            for (int v = 0; v < V; ++v) dx.at[v] = upstream.at[v] * weight.at[v] * rstd - offset;
            subtract_slope<F>(local.slope_of, repeated<V>(local.slope[p]), value, repeated<V>(rstd), dx);
            if (l1 != A(0))
              for (int v = 0; v < V; ++v) dx.at[v] += signed_as(l1, value.at[v]);
            write_pack(x + at, narrow<T>(dx));
          }
          for (int v = 0; v < V; ++v) {
            gradients.dweight[v] += upstream.at[v] * normal.at[v];
            gradients.dbias[v] += upstream.at[v];
            gradients.dthreshold[v] += stopped.at[v];
          }
        }
        if (columns.workers > 1 || affine.dweight == nullptr) continue;
        for (int v = 0; v < V; ++v) {
          affine.dweight[c + v] += gradients.dweight[v];
          affine.dbias[c + v] += gradients.dbias[v];
          if (affine.dthreshold != nullptr) affine.dthreshold[c + v] += gradients.dthreshold[v];
          gradients.dweight[v] = gradients.dbias[v] = gradients.dthreshold[v] = 0;
        }
      }
    });
    return of_row;
  }

  // Adds what has stayed with the threads to the gradients of the parameters. sums: room for (2, workers, channels)
  // numbers, with a threshold 3 of them.
  template <class Team>
  static __device__ void collect(int channels, const Affine<T>& affine, const Gradients& gradients, A* sums,
                                 const Columns<kColumnBytes>& columns, const Team& team) {
    with_vectors<T, kColumnBytes>(channels, [&](auto count) {
      constexpr int V = decltype(count)::value;
      if (columns.workers == 1 || affine.dweight == nullptr) return;
      const int rows = columns.workers * channels;
      team.sync();
      if (columns.worker < columns.workers)
        for (int v = 0; v < V; ++v) {
          const int at = columns.worker * channels + columns.first * V + v;
          sums[at] = gradients.dweight[v];
          sums[rows + at] = gradients.dbias[v];
          if (affine.dthreshold != nullptr) sums[2 * rows + at] = gradients.dthreshold[v];
        }
      team.sync();
      for (int c = team.index(); c < channels; c += team.count())
        for (int w = 0; w < columns.workers; ++w) {
          affine.dweight[c] += sums[w * channels + c];
          affine.dbias[c] += sums[rows + w * channels + c];
          if (affine.dthreshold != nullptr) affine.dthreshold[c] += sums[2 * rows + w * channels + c];
        }
    });
  }

  static __device__ int sharers(const Tile&) { return 1; }
};

}  // namespace divnorm::cuda
