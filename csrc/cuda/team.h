// Threads of a block that share a piece of work: all of them, or the warps of one role.
#pragma once

#include "hopper.h"

namespace divnorm::cuda {

struct WholeBlock {
  static __device__ int index() { return device::thread(); }
  static __device__ int count() { return device::threads(); }
  static __device__ void sync() { device::sync_block(); }
};

// `threads` threads from `first` on, whole warps, that meet at the named barrier `barrier`.
struct SomeWarps {
  int first, threads, barrier;

  __device__ int index() const { return device::thread() - first; }
  __device__ int count() const { return threads; }
  __device__ void sync() const { device::sync_warps(barrier, threads); }
};

}  // namespace divnorm::cuda
