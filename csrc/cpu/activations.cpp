// The smooth activations and their slopes.
//
// Largest errors found, in ulp of the value itself, subnormal ones included:
//
//                 float32                   float64
//                 silu  gelu  gelu_tanh     silu  gelu  gelu_tanh
//   avx2, avx512   2.0   1.9        2.0      2.8   2.9        3.0
//   baseline       2.9   3.0        110      2.9   3.6       1100
//
// The baseline cannot multiply and add in one rounding; it loses digits in the tail of gelu_tanh. Slopes are as exact
// as numbers near one can be, to 3 * 2^-23 in float32, not in their own ulp where they pass through zero. What is not
// finite is as torch has it: of -inf they are NaN, and so are the slopes of both infinities.
// tests/test_activations.py measures.
#include "exact_activations.h"
#include "quick_activations.h"
#include "smooth.h"

namespace divnorm::DIVNORM_ISA {

namespace {

constexpr int64_t kTogether = 16;  // values whose sizes are looked at at once

// quickly(z) where a size is within `end`, whatever stands beside it, and elsewhere exactly(z).
template <class V, class Quickly, class Exactly>
inline void each(V* z, int64_t count, float end, Quickly&& quickly, Exactly&& exactly) {
  if constexpr (quick::kServes<V>) {
    for (int64_t first = 0; first < count; first += kTogether) {
      const int64_t last = smaller(first + kTogether, count);
      V largest = absolute(z[first]);
      for (int64_t i = first + 1; i < last; ++i) {
        const V size = absolute(z[i]);
        largest = size > largest ? size : largest;  // what is a NaN becomes one either way
      }
      if (quick::all_within(largest, end))
        for (int64_t i = first; i < last; ++i) z[i] = quickly(z[i]);
      else
        for (int64_t i = first; i < last; ++i) z[i] = absolute(z[i]) <= splat<V>(end) ? quickly(z[i]) : exactly(z[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) z[i] = exactly(z[i]);
  }
}

}  // namespace

template <class V>
void smooth_values(V* z, int64_t count, Activation activation) {
  switch (activation) {
    case Activation::silu:
      return each(
          z, count, quick::kSiluEnd, [](auto at) { return quick::silu(at); }, [](auto at) { return exact::silu(at); });
    case Activation::gelu:
      return each(
          z, count, quick::kNormalEnd, [](auto at) { return quick::gelu(at); },
          [](auto at) { return exact::gelu(at); });
    default:
      return each(
          z, count, quick::kTanhEnd, [](auto at) { return quick::gelu_tanh(at); },
          [](auto at) { return exact::gelu_tanh(at); });
  }
}

template <class V>
void smooth_slopes(V* z, int64_t count, Activation activation) {
  switch (activation) {
    case Activation::silu:
      return each(
          z, count, quick::kSiluEnd, [](auto at) { return quick::silu_slope(at); },
          [](auto at) { return exact::silu_slope(at); });
    case Activation::gelu:
      return each(
          z, count, quick::kNormalEnd, [](auto at) { return quick::gelu_slope(at); },
          [](auto at) { return exact::gelu_slope(at); });
    default:
      return each(
          z, count, quick::kTanhEnd, [](auto at) { return quick::gelu_tanh_slope(at); },
          [](auto at) { return exact::gelu_tanh_slope(at); });
  }
}

template void smooth_values<Vec<float>>(Vec<float>*, int64_t, Activation);
template void smooth_values<Vec<double>>(Vec<double>*, int64_t, Activation);
template void smooth_slopes<Vec<float>>(Vec<float>*, int64_t, Activation);
template void smooth_slopes<Vec<double>>(Vec<double>*, int64_t, Activation);

}  // namespace divnorm::DIVNORM_ISA
