// The work on channels_last tensors whose positions come chunk by chunk, each with all of its channels: statistics are
// complete with their chunk.
#pragma once

#include "pixels.h"
#include "ring.h"

namespace divnorm::cuda {

// What these threads do, as ForwardPlanes does it. partial: of the chunk's first position.
template <class T, Form F>
class ForwardPixels {
 public:
  using A = Acc<T>;

  template <class Team>
  __device__ ForwardPixels(const Arguments&, const Portion& portion, const Team& team)
      : lanes_(portion.channels, team), columns_(portion.channels, team) {}

  __device__ void add_moments(const Tile& chunk, const T* x, bool centred, A* partial, int pitch) const {
    Pixels<T, F>::moments(chunk, x, centred, partial, pitch, lanes_);
  }
  __device__ void keep_moments(A*, int) const {}
  __device__ A normalize(const Tile& chunk, T* x, const Local<A>& local, const Affine<T>& affine, bool with_l1) const {
    return Pixels<T, F>::normalize(chunk, x, local, affine, with_l1, columns_);
  }

 private:
  typename Pixels<T, F>::Lanes lanes_;
  typename Pixels<T, F>::template Columns<kVectorBytes> columns_;
};

template <class T, Form F>
class BackwardPixels {
 public:
  using A = Acc<T>;

  template <class Team>
  __device__ BackwardPixels(const Arguments&, const Portion& portion, const Team& team)
      : channels_(portion.channels), lanes_(portion.channels, team), columns_(portion.channels, team) {}

  __device__ void add_sums(const Tile& chunk, const T* x, const T* dy, const Local<A>& local, const Affine<T>& affine,
                           A l1, A* partial, int pitch) const {
    Pixels<T, F>::sums(chunk, x, dy, local, affine, l1, partial, pitch, lanes_);
  }
  __device__ void keep_sums(A*, int) const {}
  __device__ void differentiate(const Tile& chunk, T* x, T* dy, const Local<A>& local, const Affine<T>& affine, A l1) {
    Pixels<T, F>::template differentiate<Sweep::gradient>(chunk, x, dy, local, affine, l1, gradients_, columns_);
  }
  __device__ int sharers() const { return 1; }
  // As Pixels::collect, by the threads that have done the rest.
  template <class Team>
  __device__ void collect(const Affine<T>& affine, A* sums, const Team& team) const {
    Pixels<T, F>::collect(channels_, affine, gradients_, sums, columns_, team);
  }

 private:
  int channels_;
  typename Pixels<T, F>::Lanes lanes_;
  typename Pixels<T, F>::template Columns<kColumnBytes> columns_;
  typename Pixels<T, F>::Gradients gradients_;
};

}  // namespace divnorm::cuda
