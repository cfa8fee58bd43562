// What stands behind the norm, at the last step of every kernel: a template argument of it, made from the problem.
#pragma once

#include "../problem.h"
#include "simd.h"

namespace divnorm::DIVNORM_ISA {

// The smooth activations and their slopes, of a vector or one number; compiled in activations.cpp. A call of them is
// short beside what they do, and as code of their own they stand in no kernel.
template <class V>
V smooth_value(V z, Activation activation);
template <class V>
V smooth_slope(V z, Activation activation);

// Nothing, or a ReLU.
template <class A>
class Clamped {
 public:
  explicit Clamped(const Problem& problem) : floor_(problem.template floor<A>()) {}

  template <class V>
  V value(V z) const {
    return rectified<V>(z, floor_);
  }
  // What of y's gradient reaches z.
  template <class V>
  V gradient(V grad, V z) const {
    return passed<V>(grad, z, floor_);
  }

 private:
  A floor_;
};

template <class A>
class Smooth {
 public:
  explicit Smooth(const Problem& problem) : activation_(problem.activation) {}

  template <class V>
  V value(V z) const {
    if constexpr (is_pair<V>)
      return {value(z.even), value(z.odd)};
    else
      return smooth_value<V>(z, activation_);
  }
  template <class V>
  V gradient(V grad, V z) const {
    if constexpr (is_pair<V>)
      return {gradient(grad.even, z.even), gradient(grad.odd, z.odd)};
    else
      return grad * smooth_slope<V>(z, activation_);
  }

 private:
  Activation activation_;
};

inline bool is_smooth(const Problem& problem) {
  return problem.activation != Activation::none && problem.activation != Activation::relu;
}

// body(epilogue)
template <class A, class Body>
inline auto with_epilogue(const Problem& problem, Body&& body) {
  return is_smooth(problem) ? body(Smooth<A>(problem)) : body(Clamped<A>(problem));
}

// body(epilogue, whether backward has more than dy to look at: an activation, or with `signs` those of v)
template <class A, class Body>
inline auto with_kinks(const Problem& problem, bool signs, Body&& body) {
  if (is_smooth(problem)) return body(Smooth<A>(problem), std::true_type{});
  const Clamped<A> clamped(problem);
  return signs || problem.activation != Activation::none ? body(clamped, std::true_type{})
                                                         : body(clamped, std::false_type{});
}

}  // namespace divnorm::DIVNORM_ISA
