// Negative powers of numbers, many at once: d^-beta and 1 / d.
//
// 1/2, 3/4 and 1 are made of roots and quotients, to 3 ulp, but for general kernels (see lanes.h). Other powers, and
// theirs, are exp(-beta ln(d)), whose error grows with the exponent, by half an ulp for each |beta ln(d)|.
#pragma once

#include <cmath>

#include "exact_activations.h"
#include "roots.h"

namespace divnorm::DIVNORM_ISA {

enum class Power { half, three_quarters, one, any };

// The whole numbers that bits stand for in two's complement, each of a size below 2^20.
template <class V>
inline V whole(Bits<V> bits) {
  const V round = splat<V>(Series<typename Lane<V>::type>::kRound);
  return bit_cast<V>(bit_cast<Bits<V>>(round) + bits) - round;
}

// ln(d) of a normal d: of 2^exponent (1 + f) with f between -1/3 and 1/3 by the series of the area tangent.
template <class V>
inline V normal_logarithm(V d) {
  using A = typename Lane<V>::type;
  using S = Series<A>;
  using U = Bits<V>;
  constexpr int terms = std::is_same_v<A, float> ? 5 : 12;
  const U least = bit_cast<U>(splat<V>(A(2) / 3)), one = bit_cast<U>(splat<V>(1));
  const U exponent = ((bit_cast<U>(d) - least + one) >> S::kMantissa) - S::kBias;
  const V f = bit_cast<V>(bit_cast<U>(d) - (exponent << S::kMantissa)) - splat<V>(1);
  const V s = f / (splat<V>(2) + f), square = s * s;
  V series = splat<V>(A(1) / (2 * terms + 1));
  for (int i = terms - 1; i > 0; --i) series = fused(series, square, splat<V>(A(1) / (2 * i + 1)));
  const V power = whole<V>(exponent);
  const V bent = fused<V>(-s, fused<V>(splat<V>(-2) * square, series, f), power * splat<V>(S::kLn2Rest));
  return fused(power, splat<V>(S::kLn2Head), f + bent);
}

// d^-beta, 1 / d and for Power::any ln(d).
template <class V>
struct Powers {
  V power, inverse, logarithm;
};

// Whether no number of bits is above most.
template <class U>
inline bool none_above(U bits, U most) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<U, Word>)
    return _mm512_cmpgt_epu32_mask(bit_cast<__m512i>(bits), bit_cast<__m512i>(most)) == 0;
#elif defined(__AVX2__)
  const auto above = bits > most;
  return _mm256_testz_si256(bit_cast<__m256i>(above), bit_cast<__m256i>(above)) != 0;
#endif
  bool none = true;
  for (size_t i = 0; i < sizeof(U) / sizeof(bits[0]); ++i) none &= bits[i] <= most[i];
  return none;
}

// What beta is, and between which d all is plain: `kSpan` of their bits.
template <class A>
class Exponents {
 public:
  using V = Vec<A>;
  using U = Bits<V>;

  // `exact`: whether the three exponents that are roots are to be taken as such.
  Exponents(double beta, bool exact) : beta_(static_cast<A>(beta)) {
    if (exact && beta == 0.5) kind_ = Power::half;
    if (exact && beta == 0.75) kind_ = Power::three_quarters;
    if (exact && beta == 1) kind_ = Power::one;
    // ln(d) up to which exp(-beta ln(d)) is a normal number; and squares and products of roots are
    const A end = A(Series<A>::kExponentEnd), most = end / (std::fabs(beta_) > 1 ? std::fabs(beta_) : A(1));
    const A last = std::exp((most < end ? most : end) * A(0.75));
    first_ = bit_cast<Number>(1 / last);
    span_ = bit_cast<Number>(last) - first_;
  }

  Power kind() const { return kind_; }
  A beta() const { return beta_; }

  // Of many d: the largest distance from the first plain one.
  U seen(U before, V d) const {
    const U distance = bit_cast<U>(d) - first_;
    return distance > before ? distance : before;
  }
  bool plain(U seen) const { return none_above(seen, U{} + span_); }

  // Of d that are plain.
  template <Power P>
  Powers<V> of_plain(V d) const {
    const V one = splat<V>(1);
    if constexpr (P == Power::any) {
      const V logarithm = normal_logarithm(d);
      return {exact::bounded_exponential<V>(splat<V>(-beta_) * logarithm), one / d, logarithm};
    } else if constexpr (P == Power::one) {
      return {one / d, one / d, V{}};
    } else {
      const V r = inverse_root<true>(d), inverse = r * r;
      if constexpr (P == Power::half) return {r, inverse, V{}};
      return {kRough ? inverse * inverse_root<true>(r) : r * root(r), inverse, V{}};
    }
  }

  // Of any: those that are plain among them as they are elsewhere, whatever stands beside them.
  template <Power P>
  Powers<V> of_any(V d) const {
    Powers<V> found = of_plain<P>(d);
    for (int i = 0; i < kWidth<V>; ++i) {
      if (bit_cast<Number>(A(d[i])) - first_ <= span_) continue;
      found.inverse[i] = 1 / d[i];
      if constexpr (P == Power::half) found.power[i] = 1 / std::sqrt(d[i]);
      if constexpr (P == Power::three_quarters) found.power[i] = 1 / (std::sqrt(d[i]) * std::sqrt(std::sqrt(d[i])));
      if constexpr (P == Power::one) found.power[i] = 1 / d[i];
      if constexpr (P == Power::any) {
        found.logarithm[i] = std::log(d[i]);
        found.power[i] = std::pow(d[i], -beta_);
      }
    }
    return found;
  }

 private:
  using Number = Bits<A>;
#if defined(__FMA__)
  static constexpr bool kRough = std::is_same_v<A, float>;
#else
  static constexpr bool kRough = false;
#endif

  Power kind_ = Power::any;
  A beta_;
  Number first_, span_;
};

}  // namespace divnorm::DIVNORM_ISA
