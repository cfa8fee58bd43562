// What stands behind the norm: the activation of z = weight * v / s + bias + residual, and dy act'(z) in place of dy.
#pragma once

#include <cmath>

#include "numbers.h"

namespace divnorm::cuda {

// y and the gradient of z of a smooth activation: y is a share of z.
template <class A>
struct Share {
  A share, slope;  // its derivative by z
  __device__ A value(A z) const { return z * share; }
  __device__ A gradient(A z) const { return share + z * slope; }
};

// The logistic function of z; with `tanh` that of 2t, which is (1 + tanh(t)) / 2 of the approximation's t.
template <class A>
__device__ Share<A> logistic(bool tanh, A z) {
  const A linear = tanh ? A(1.5957691216057307117) : A(1), cubic = tanh ? A(0.044715) : A(0);
  constexpr A kFlat = A(1e4);  // from this square on that share is 0 or 1, and what is infinite no use
  const A square = z * z < kFlat ? z * z : kFlat;
  const A e = std::exp(-std::abs(linear * z * (A(1) + cubic * square)));
  const A larger = device::reciprocal(A(1) + e), smaller = e * larger;  // not 1 - larger, which would cancel
  return {z < A(0) ? smaller : larger, larger * smaller * linear * (A(1) + A(3) * cubic * square)};
}

// The normal distribution's. 1 + erf would cancel where z is far below zero.
template <class A>
__device__ Share<A> normal(A z) {
  constexpr A kRootHalf = A(0.70710678118654752440), kDensity = A(0.39894228040143267794);
  return {A(0.5) * std::erfc(-kRootHalf * z), kDensity * std::exp(A(-0.5) * z * z)};
}

// What a smooth activation makes of each z, of_share(share, z). One at a time, and the rest moves up: a loop holds this
// for every width, and all at once would be most of its code and of its registers.
template <class A, int Count, class Body>
__device__ void smooth(Activation activation, Pack<A, Count>& z, Body&& of_share) {
#pragma unroll 1
  for (int i = 0; i < Count; ++i) {
    const A at = z.at[0];
    const A done = activation == Activation::gelu ? of_share(normal(at), at)
                                                  : of_share(logistic(activation == Activation::gelu_tanh, at), at);
#pragma unroll
    for (int v = 0; v + 1 < Count; ++v) z.at[v] = z.at[v + 1];
    z.at[Count - 1] = done;
  }
}

// Whether y ends where z meets a threshold: zero, of a ReLU.
__device__ inline bool bounded(Activation activation) {
  return activation == Activation::relu || activation == Activation::tlu;
}

// Whether z stays behind its threshold. A NaN does not, and nothing else passes a threshold that is one.
template <class A>
__device__ bool stops(A z, A threshold) {
  return !(z > threshold) && z == z;
}

// y in place of z. threshold() reads a pack of them; the plain form has none but a ReLU's.
template <Form F, class A, int Count, class Threshold>
__device__ void activate(Activation activation, Pack<A, Count>& z, Threshold&& threshold) {
  if (activation == Activation::none) return;
  if constexpr (F == Form::plain) {
    for (int v = 0; v < Count; ++v) z.at[v] = z.at[v] < A(0) ? A(0) : z.at[v];
  } else if (bounded(activation)) {
    const Pack<A, Count> least = threshold();
    for (int v = 0; v < Count; ++v) z.at[v] = stops(z.at[v], least.at[v]) ? least.at[v] : z.at[v];
  } else {
    smooth(activation, z, [](const Share<A>& of, A at) { return of.value(at); });
  }
}

// The gradient of z in place of y's, where there is an activation; returns what the thresholds receive of it.
template <Form F, class A, int Count, class Threshold>
__device__ Pack<A, Count> pass_back(Activation activation, const Pack<A, Count>& z, Pack<A, Count>& upstream,
                                    Threshold&& threshold) {
  Pack<A, Count> stopped = {};
  if constexpr (F == Form::plain) {
    for (int v = 0; v < Count; ++v) upstream.at[v] = z.at[v] <= A(0) ? A(0) : upstream.at[v];
  } else if (bounded(activation)) {
    const Pack<A, Count> least = threshold();
    for (int v = 0; v < Count; ++v) {
      const bool stop = stops(z.at[v], least.at[v]);
      stopped.at[v] = stop ? upstream.at[v] : A(0);
      upstream.at[v] = stop ? A(0) : upstream.at[v];
    }
  } else {
    Pack<A, Count> gradient = z;
    smooth(activation, gradient, [](const Share<A>& of, A at) { return of.gradient(at); });
    for (int v = 0; v < Count; ++v) upstream.at[v] *= gradient.at[v];
  }
  return stopped;
}

}  // namespace divnorm::cuda
