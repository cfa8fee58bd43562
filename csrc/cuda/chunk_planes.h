// The work on contiguous tensors whose channels come chunk by chunk.
#pragma once

#include "channel_sums.h"
#include "plane_column.h"
#include "planes.h"
#include "running.h"

namespace divnorm::cuda {

template <class T, Form F>
class ForwardPlanes {
 public:
  using A = Acc<T>;

  template <class Team>
  __device__ ForwardPlanes(const Arguments& args, const Portion& portion, const Team& team)
      : column_(args, portion, team) {}

  __device__ void add_moments(const Tile& chunk, const T* x, bool centred, A*, int) {
    column_.with_place([&](auto place) {
      constexpr int V = decltype(place)::kCount;
      const int first = column_.first(chunk), step = column_.slices().count * column_.period_numbers();
      const T* const column = x + first * column_.period_numbers() + place.at;
      moments_.template add<V>(column_.count(chunk, first), centred,
                               [&](int i) { return widen(read_pack<V>(column + i * step)); });
    });
  }

  // What add_moments() has found of a sample, as Planes::moments leaves it, by pieces in place of slices.
  __device__ void keep_moments(A* partial, int pitch) {
    column_.with_place([&](auto place) {
      constexpr int V = decltype(place)::kCount;
      Pack<A, V> mean, squares;
      moments_.template take<V>(mean, squares);
      place.write(partial, column_.period_channels(), pitch, mean);
      place.write(partial + column_.pieces() * pitch, column_.period_channels(), pitch, squares);
    });
  }

  // As Planes::normalize.
  __device__ A normalize(const Tile& chunk, T* x, const Local<A>& local, const Affine<T>& affine, bool with_l1) const {
    A sum = 0;
    column_.for_each(chunk, local, affine,
                     [&](auto of, int at, auto channels, int p, const auto& mean, const auto& rstd) {
                       sum += Planes<T, F>::template normalize_numbers<typename decltype(of)::type>(
                           x, at, channels, p, mean, rstd, local, affine, with_l1);
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

  template <class Team>
  __device__ BackwardPlanes(const Arguments& args, const Portion& portion, const Team& team)
      : column_(args, portion, team), sharing_(args.pipeline.chunk_channels, team), channels_(portion.channels) {}

  __device__ void add_sums(const Tile& chunk, const T* x, const T* dy, const Local<A>& local, const Affine<T>& affine,
                           A l1, A*, int) {
    column_.for_each(
        chunk, local, affine, [&](auto of, int at, auto channels, int p, const auto& mean, const auto& rstd) {
          sums_.template add<F, typename decltype(of)::type>(x, dy, at, channels, p, mean, rstd, local, affine, l1);
        });
  }

  // As Planes::sums leaves them, by pieces in place of slices.
  __device__ void keep_sums(A* partial, int pitch) {
    column_.with_place([&](auto place) {
      constexpr int V = decltype(place)::kCount;
      const int pieces = column_.period_channels(), step = column_.pieces() * pitch;
      place.write(partial, pieces, pitch, packed<V>(sums_.scale));
      place.write(partial + step, pieces, pitch, packed<V>(sums_.shift));
      place.write(partial + 2 * step, pieces, pitch, packed<V>(sums_.centred));
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
