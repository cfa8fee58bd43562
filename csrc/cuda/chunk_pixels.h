// Statistics of channels_last tensors whose positions come chunk by chunk, each with all of its channels: they are
// complete with their chunk.
#pragma once

#include "pixels.h"

namespace divnorm::cuda {

template <class T, Form F>
class PixelChunks {
 public:
  using A = Acc<T>;

  // partial: of the chunk's first position.
  template <class Team>
  __device__ void add_moments(const Tile& chunk, const T* x, bool centred, const Slices& slices, A* partial, int pitch,
                              const Team& team) {
    Pixels<T, F>::moments(chunk, x, centred, slices, partial, pitch, team);
  }
  template <class Team>
  __device__ void keep_moments(int, const Slices&, A*, int, const Team&) {}

  template <class Team>
  __device__ void add_sums(const Tile& chunk, const T* x, const T* dy, const Local<A>& local, const Affine<T>& affine,
                           A l1, const Slices& slices, A* partial, int pitch, const Team& team) {
    Pixels<T, F>::sums(chunk, x, dy, local, affine, l1, slices, partial, pitch, team);
  }
  template <class Team>
  __device__ void keep_sums(int, const Slices&, A*, int, const Team&) {}
};

}  // namespace divnorm::cuda
