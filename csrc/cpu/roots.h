// Square roots of vectors, and what one is by them.
#pragma once

#include <cmath>

#include "elementary.h"

namespace divnorm::DIVNORM_ISA {

// Compilers make single roots of a loop over lanes.
template <class V>
inline V root(V v) {
  if constexpr (is_scalar<V>) return std::sqrt(v);
#if defined(__AVX512F__)
  else if constexpr (std::is_same_v<V, Vec<float>>)
    return bit_cast<V>(_mm512_sqrt_ps(bit_cast<__m512>(v)));
  else
    return bit_cast<V>(_mm512_sqrt_pd(bit_cast<__m512d>(v)));
#elif defined(__AVX2__)
  else if constexpr (std::is_same_v<V, Vec<float>>)
    return bit_cast<V>(_mm256_sqrt_ps(bit_cast<__m256>(v)));
  else
    return bit_cast<V>(_mm256_sqrt_pd(bit_cast<__m256d>(v)));
#elif defined(__x86_64__)
  else if constexpr (std::is_same_v<V, Vec<float>>)
    return bit_cast<V>(_mm_sqrt_ps(bit_cast<__m128>(v)));
  else
    return bit_cast<V>(_mm_sqrt_pd(bit_cast<__m128d>(v)));
#else
  else {
    for (int64_t i = 0; i < kWidth<V>; ++i) v[i] = std::sqrt(v[i]);
    return v;
  }
#endif
}

// 1 / sqrt(d). Rough: from the processor's estimate r, whose error e = 1 - d r^2 is below 2^-10, by the terms of
// (1 - e)^-1/2 up to e^2; of a d far from float's ends.
template <bool Rough, class V>
inline V inverse_root(V d) {
#if defined(__FMA__)
  if constexpr (Rough && std::is_same_v<V, Vec<float>>) {
#if defined(__AVX512F__)
    const V r = bit_cast<V>(_mm512_rsqrt14_ps(bit_cast<__m512>(d)));
#else
    const V r = bit_cast<V>(_mm256_rsqrt_ps(bit_cast<__m256>(d)));
#endif
    const V e = fused<V>(-(d * r), r, splat<V>(1));
    return fused<V>(r * e, fused(e, splat<V>(0.375), splat<V>(0.5)), r);
  }
#endif
  return splat<V>(1) / root(d);
}

}  // namespace divnorm::DIVNORM_ISA
