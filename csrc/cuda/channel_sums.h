// What backward sums over the channels of a contiguous tensor's positions.
#pragma once

#include "tile.h"

namespace divnorm::cuda {

// Of up to Count positions side by side: P2 = sum of g v; P1 rstd + l1's share; V = sum of v, for p = 1 S = sum of the
// signs of v. Where x stands in the numerator, so it does in P2, and there is no P1.
template <class A, int Count>
struct ChannelSums {
  A scale[Count] = {}, shift[Count] = {}, centred[Count] = {};

  // Of V numbers at `at` of the tile: of channel c, or of two channels, from position p on.
  template <Form F, class Parameter, int V, class T, class Channel>
  __device__ void add(const T* x, const T* dy, int at, const Channel& c, int p, const Pack<A, V>& mean,
                      const Pack<A, V>& rstd, const Local<A>& local, const Affine<T>& affine, A l1) {
    const Pack<A, V> number = widen(read_pack<V>(x + at));
    Pack<A, V> upstream = widen(read_pack<V>(dy + at));
    const Pack<A, V> weight = Parameter(affine.weight, c).template at<V>(p);
    Pack<A, V> value;
    for (int v = 0; v < V; ++v) value.at[v] = number.at[v] - mean.at[v];
    const Pack<A, V> over = numerator<F>(local, number, value);
    if (affine.activation != Activation::none) {
      Pack<A, V> z = Parameter(affine.bias, c).template at<V>(p);
      for (int v = 0; v < V; ++v) z.at[v] += over.at[v] * rstd.at[v] * weight.at[v];
      add_residual<F>(affine, at, z);
      pass_back<F>(affine.activation, z, upstream, [&] { return Parameter(affine.threshold, c).template at<V>(p); });
    }
    for (int v = 0; v < V; ++v) {
      const A g = upstream.at[v] * weight.at[v];
      scale[v] += g * over.at[v];
      if (F == Form::plain || !local.keeps_mean) shift[v] += g * rstd.at[v];
      centred[v] += F == Form::general && local.absolute ? signed_as(A(1), value.at[v]) : value.at[v];
    }
    if (l1 != A(0))
      for (int v = 0; v < V; ++v) shift[v] += signed_as(l1, value.at[v]);
  }
};

}  // namespace divnorm::cuda
