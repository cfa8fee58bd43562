// What a thread keeps of its positions while their channels come set by set: moments of forward, sums of backward.
#pragma once

#include "tile.h"

namespace divnorm::cuda {

// Mean and sum of squares about it, of up to Count positions side by side. A set is summed about a pivot, the mean of
// what has been merged before, and merged once there would be more of it than of that: with M2 = M2 + q - (n + m) (d /
// (n + m))^2, where d and q are the sums of m differences and their squares, no more than about half of q cancels.
template <class A, int Count>
class RunningMoments {
 public:
  // `numbers` more of V positions, of(i) for each; not centred: the squares are about 0.
  template <int V, class Of>
  __device__ void add(int numbers, bool centred, Of&& of) {
    if (centred && merged_ == 0) return start<V>(numbers, of);
    if (centred && pending_ + numbers > merged_) merge<V>();
    add_about_pivot<V>(numbers, of);
    pending_ += centred ? numbers : 0;
  }

  // The moments of all that has been added, which is then forgotten.
  template <int V>
  __device__ void take(Pack<A, V>& mean, Pack<A, V>& squares) {
    if (pending_ > 0) merge<V>();
    for (int v = 0; v < V; ++v) {
      mean.at[v] = mean_[v];
      squares.at[v] = merged_ > 0 ? squares_[v] : square_sum_[v];
      mean_[v] = squares_[v] = sum_[v] = square_sum_[v] = pivot_[v] = 0;
    }
    merged_ = pending_ = 0;
  }

 private:
  template <int V, class Of>
  __device__ void start(int numbers, Of&& of) {
    if (numbers == 0) return;
    const A each = A(1) / static_cast<A>(numbers);
    A rest[V] = {};
#pragma unroll 4
    for (int i = 0; i < numbers; ++i) {
      const Pack<A, V> number = of(i);
      for (int v = 0; v < V; ++v) mean_[v] += number.at[v];
    }
    for (int v = 0; v < V; ++v) mean_[v] *= each;
#pragma unroll 4
    for (int i = 0; i < numbers; ++i) {
      const Pack<A, V> number = of(i);
      for (int v = 0; v < V; ++v) {
        const A difference = number.at[v] - mean_[v];
        rest[v] += difference;
        squares_[v] += difference * difference;
      }
    }
    for (int v = 0; v < V; ++v) {
      mean_[v] = corrected(mean_[v], rest[v] * each);
      pivot_[v] = pivot(v);
    }
    merged_ = numbers;
  }

  // A mean that is not finite is no pivot: what is finite would be none any more.
  __device__ A pivot(int v) const { return finite(mean_[v]) ? mean_[v] : A(0); }

  template <int V, class Of>
  __device__ void add_about_pivot(int numbers, Of&& of) {
#pragma unroll 4
    for (int i = 0; i < numbers; ++i) {
      const Pack<A, V> number = of(i);
      for (int v = 0; v < V; ++v) {
        const A difference = number.at[v] - pivot_[v];
        sum_[v] += difference;
        square_sum_[v] += difference * difference;
      }
    }
  }

  template <int V>
  __device__ void merge() {
    merged_ += pending_;
    pending_ = 0;
    const A all = static_cast<A>(merged_), each = A(1) / all;
    for (int v = 0; v < V; ++v) {
      const A on = sum_[v] * each;
      mean_[v] += on;
      squares_[v] += squares_about_mean(square_sum_[v], sum_[v], on);
      sum_[v] = square_sum_[v] = 0;
      pivot_[v] = pivot(v);
    }
  }

  int merged_ = 0, pending_ = 0;
  A mean_[Count] = {}, squares_[Count] = {}, pivot_[Count] = {};
  A sum_[Count] = {}, square_sum_[Count] = {};  // of what is pending, about the pivot
};

}  // namespace divnorm::cuda
