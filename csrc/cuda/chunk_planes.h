// The work on contiguous tensors whose channels come chunk by chunk: a thread keeps to a slice of the block's channels
// at positions of its own. A slice has one channel more in some chunks than in others, and another one then than its
// neighbours.
#pragma once

#include "channel_sums.h"
#include "planes.h"
#include "ring.h"
#include "running.h"

namespace divnorm::cuda {

// Bytes: of positions side by side that a thread takes together.
template <class T, int Bytes>
class PlaneColumn {
 public:
  template <class Team>
  __device__ PlaneColumn(const Portion& portion, const Slices& slices, const Team& team)
      : positions_(portion.positions), channel_(portion.channel), slices_(slices) {
    with_vectors<T, Bytes>(positions_, [&](auto count) {
      constexpr int V = decltype(count)::value;
      const int vectors = positions_ / V;
      slice_ = team.index() / vectors;
      first_ = (team.index() - slice_ * vectors) * V;
    });
  }
  // Calls body(Count as a constant, slice, first position) by every thread that there is something for.
  template <class Body>
  __device__ void with_place(Body&& body) const {
    if (slice_ >= slices_.count) return;
    with_vectors<T, Bytes>(positions_, [&](auto count) { body(count, slice_, first_); });
  }
  // The same with the first of the slice's channels in a chunk in place of the slice.
  template <class Body>
  __device__ void with_channels(const Tile& chunk, Body&& body) const {
    const int behind = chunk.channel - channel_ + slices_.count - 1 - slice_;
    const int first = slices_.count - 1 - (behind - quotient(slices_.by_count, behind) * slices_.count);
    with_place([&](auto count, int, int p) { body(count, first, p); });
  }
  __device__ const Slices& slices() const { return slices_; }

  static constexpr int kMost = Bytes < static_cast<int>(sizeof(T)) ? 1 : Bytes / sizeof(T);

 private:
  int positions_, channel_, slice_, first_;
  const Slices& slices_;
};

template <class T, Form F>
class ForwardPlanes {
 public:
  using A = Acc<T>;

  template <class Team>
  __device__ ForwardPlanes(const Portion& portion, const Slices& slices, const Team& team)
      : column_(portion, slices, team) {}

  __device__ void add_moments(const Tile& chunk, const T* x, bool centred, A*, int) {
    column_.with_channels(chunk, [&](auto count, int first, int p) {
      constexpr int V = decltype(count)::value;
      const Slices& slices = column_.slices();
      const T* const column = x + first * chunk.positions + p;
      const int step = slices.count * chunk.positions;
      moments_.template add<V>(slice_channels(chunk.channels, first, slices), centred,
                               [&](int i) { return widen(read_pack<V>(column + i * step)); });
    });
  }

  // What add_moments() has found of a sample, as Planes::moments leaves it.
  __device__ void keep_moments(A* partial, int pitch) {
    column_.with_place([&](auto count, int slice, int p) {
      constexpr int V = decltype(count)::value;
      Pack<A, V> mean, squares;
      moments_.template take<V>(mean, squares);
      write_pack(partial + slice * pitch + p, mean);
      write_pack(partial + (column_.slices().count + slice) * pitch + p, squares);
    });
  }

  // As Planes::normalize.
  __device__ A normalize(const Tile& chunk, T* x, const Local<A>& local, const Affine<T>& affine, bool with_l1) const {
    A sum = 0;
    column_.with_channels(chunk, [&](auto count, int first, int p) {
      sum = Planes<T, F>::template normalize_channels<decltype(count)::value>(chunk, x, first, column_.slices().count,
                                                                              p, local, affine, with_l1);
    });
    return sum;
  }

 private:
  using Column = PlaneColumn<T, kVectorBytes>;
  Column column_;
  RunningMoments<A, Column::kMost> moments_;
};

template <class T, Form F>
class BackwardPlanes {
 public:
  using A = Acc<T>;

  // channels: of the block, and of a chunk.
  template <class Team>
  __device__ BackwardPlanes(const Portion& portion, const Slices& slices, int chunk_channels, const Team& team)
      : column_(portion, slices, team), sharing_(chunk_channels, team), channels_(portion.channels) {}

  __device__ void add_sums(const Tile& chunk, const T* x, const T* dy, const Local<A>& local, const Affine<T>& affine,
                           A l1, A*, int) {
    column_.with_channels(chunk, [&](auto count, int first, int p) {
      constexpr int V = decltype(count)::value;
      with_parameters(affine, [&](auto per_position) {
        using Parameter = OfChannel<A, decltype(per_position)::value>;
        const Pack<A, V> mean = read_pack<V>(local.mean + p), rstd = read_pack<V>(local.rstd + p);
#pragma unroll 2
        for (int c = first; c < chunk.channels; c += column_.slices().count)
          sums_.template add<F, Parameter, V>(x, dy, c * chunk.positions + p, c, p, mean, rstd, local, affine, l1);
      });
    });
  }

  // As Planes::sums leaves them.
  __device__ void keep_sums(A* partial, int pitch) {
    column_.with_place([&](auto count, int slice, int p) {
      constexpr int V = decltype(count)::value;
      const int slices = column_.slices().count;
      write_pack(partial + slice * pitch + p, packed<V>(sums_.scale));
      write_pack(partial + (slices + slice) * pitch + p, packed<V>(sums_.shift));
      write_pack(partial + (2 * slices + slice) * pitch + p, packed<V>(sums_.centred));
    });
    sums_ = {};
  }

  // As Planes::differentiate.
  __device__ void differentiate(const Tile& chunk, T* x, T* dy, const Local<A>& local, const Affine<T>& affine, A l1) {
    Planes<T, F>::template differentiate<Sweep::gradient>(chunk, x, dy, local, affine, l1, sharing_, channels_);
  }

  // How many numbers are kept of a channel's gradients.
  __device__ int sharers() const { return sharing_.sharers; }
  // Nothing of them stays with the threads.
  template <class Team>
  __device__ void collect(const Affine<T>&, A*, const Team&) const {}

 private:
  using Column = PlaneColumn<T, kColumnBytes>;
  Column column_;
  typename Planes<T, F>::Sharing sharing_;
  int channels_;
  ChannelSums<A, Column::kMost> sums_;
};

}  // namespace divnorm::cuda
