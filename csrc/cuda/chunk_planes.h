// Statistics of contiguous tensors whose channels come chunk by chunk: a thread keeps to a slice of every chunk's
// channels at positions of its own.
#pragma once

#include "channel_sums.h"
#include "planes.h"
#include "running.h"

namespace divnorm::cuda {

template <class T, Form F>
class PlaneChunks {
 public:
  using A = Acc<T>;

  template <class Team>
  __device__ void add_moments(const Tile& chunk, const T* x, bool centred, const Slices& slices, A*, int,
                              const Team& team) {
    with_place<kVectorBytes>(chunk.positions, slices, team, [&](auto count, int slice, int p) {
      constexpr int V = decltype(count)::value;
      const T* const column = x + slice * chunk.positions + p;
      const int step = slices.count * chunk.positions;
      moments_.template add<V>(slice_channels(chunk.channels, slice, slices), centred,
                               [&](int i) { return widen(read_pack<V>(column + i * step)); });
    });
  }

  // What add_moments() has found of a sample, as Planes::moments leaves it.
  template <class Team>
  __device__ void keep_moments(int positions, const Slices& slices, A* partial, int pitch, const Team& team) {
    with_place<kVectorBytes>(positions, slices, team, [&](auto count, int slice, int p) {
      constexpr int V = decltype(count)::value;
      Pack<A, V> mean, squares;
      moments_.template take<V>(mean, squares);
      write_pack(partial + slice * pitch + p, mean);
      write_pack(partial + (slices.count + slice) * pitch + p, squares);
    });
  }

  template <class Team>
  __device__ void add_sums(const Tile& chunk, const T* x, const T* dy, const Local<A>& local, const Affine<T>& affine,
                           A l1, const Slices& slices, A*, int, const Team& team) {
    with_place<kColumnBytes>(chunk.positions, slices, team, [&](auto count, int slice, int p) {
      constexpr int V = decltype(count)::value;
      with_parameters(affine, [&](auto per_position) {
        using Parameter = OfChannel<A, decltype(per_position)::value>;
        const Pack<A, V> mean = read_pack<V>(local.mean + p), rstd = read_pack<V>(local.rstd + p);
#pragma unroll 2
        for (int c = slice; c < chunk.channels; c += slices.count)
          sums_.template add<F, Parameter, V>(x, dy, c * chunk.positions + p, c, p, mean, rstd, local, affine, l1);
      });
    });
  }

  // As Planes::sums leaves them.
  template <class Team>
  __device__ void keep_sums(int positions, const Slices& slices, A* partial, int pitch, const Team& team) {
    with_place<kColumnBytes>(positions, slices, team, [&](auto count, int slice, int p) {
      constexpr int V = decltype(count)::value;
      write_pack(partial + slice * pitch + p, packed<V>(sums_.scale));
      write_pack(partial + (slices.count + slice) * pitch + p, packed<V>(sums_.shift));
      write_pack(partial + (2 * slices.count + slice) * pitch + p, packed<V>(sums_.centred));
    });
    sums_ = {};
  }

 private:
  static constexpr int numbers(int bytes) { return bytes < static_cast<int>(sizeof(T)) ? 1 : bytes / sizeof(T); }

  // Calls body(Count as a constant, slice, first position) by every thread that there is something for.
  template <int Bytes, class Team, class Body>
  static __device__ void with_place(int positions, const Slices& slices, const Team& team, Body&& body) {
    with_vectors<T, Bytes>(positions, [&](auto count) {
      const int vectors = positions / decltype(count)::value, slice = team.index() / vectors;
      if (slice < slices.count) body(count, slice, (team.index() - slice * vectors) * decltype(count)::value);
    });
  }

  RunningMoments<A, numbers(kVectorBytes)> moments_;
  ChannelSums<A, numbers(kColumnBytes)> sums_;
};

}  // namespace divnorm::cuda
