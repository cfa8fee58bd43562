// The smooth activations and their slopes in float32, where nothing overflows or vanishes and the set multiplies and
// adds in one rounding.
#pragma once

#include "elementary.h"

namespace divnorm::DIVNORM_ISA::quick {

#if defined(__FMA__)
template <class V>
constexpr bool kServes = std::is_same_v<typename Lane<V>::type, float>;
#else
template <class V>
constexpr bool kServes = false;
#endif

// The sizes of z up to which the functions below are right.
constexpr float kSiluEnd = 87, kTanhEnd = 9.9f, kNormalEnd = 9;

template <class V>
inline bool all_within(V size, float end) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(bit_cast<__m512>(size), _mm512_set1_ps(end), _CMP_LE_OQ) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(bit_cast<__m256>(size), _mm256_set1_ps(end), _CMP_LE_OQ)) == 0xff;
#else
  bool within = true;
  for (int i = 0; i < kWidth<V>; ++i) within &= size[i] <= end;
  return within;
#endif
}

// exp(x + rest) = scale + scale * bent, for an x between -87 and 87 and a rest that is small beside it.
template <class V>
struct Exponential {
  V scale, bent;

  explicit Exponential(V x, V rest = splat<V>(0)) {
    using S = Series<float>;
    using U = Bits<V>;
    const V round = splat<V>(S::kRound + S::kBias), shifted = fused(x, splat<V>(S::kLog2e), round);
    const V power = shifted - round;
    const V r = fused(power, splat<V>(-S::kLn2Head), x) + fused(power, splat<V>(-S::kLn2Rest), rest);
    scale = bit_cast<V>(bit_cast<U>(shifted) << S::kMantissa);
    bent = fused(r * r, polynomial<V>(S::exponential, r), r);
  }
};

// z / (1 + exp(-(steepened + rest))). The smaller two of the divisor's parts are added first.
template <class V>
inline V logistic_product(V z, V steepened, V rest) {
  const Exponential<V> e(-steepened, -rest);
  return z / (e.scale + fused(e.scale, e.bent, splat<V>(1)));
}

// Its slope, where that of `steepened` is `steepness`.
template <class V>
inline V logistic_slope(V z, V steepened, V steepness) {
  const Exponential<V> e(-steepened);
  const V grown = fused(e.scale, e.bent, e.scale), share = splat<V>(1) / (splat<V>(1) + grown);
  return fused(z * steepness * share, grown * share, share);
}

template <class V>
inline V silu(V z) {
  return logistic_product(z, z, splat<V>(0));
}

template <class V>
inline V silu_slope(V z) {
  return logistic_slope(z, z, splat<V>(1));
}

// As exact::gelu_tanh, in fewer steps.
template <class V>
inline V gelu_tanh(V z) {
  constexpr float head = 0x1.9884p0f;  // so short that what a slope lacks of it is a float
  const auto cubic = constant<V>(kCubic);
  const V square = z * z, square_rest = fused(z, z, -square), linear = splat<V>(head);
  const V slope = fused(cubic.sum, square, linear);
  const V lost = fused(cubic.sum, square, linear - slope) + fused(cubic.lost, square, splat<V>(kLinear - head));
  const V steepened = z * slope, rest = fused(z, slope, -steepened);
  return logistic_product(z, steepened, fused(z, fused(cubic.sum, square_rest, lost), rest));
}

template <class V>
inline V gelu_tanh_slope(V z) {
  const V linear = splat<V>(kLinear), bent = splat<V>(kCubic) * z * z;
  return logistic_slope<V>(z, z * (linear + bent), fused(splat<V>(3), bent, linear));
}

// exp(-a^2 / 2) / Phi(-a) is 2 + kSteep a less a * numerator / denominator, which is small beside
// it where its own error would show most; to 2^-27 for a up to 9, by weighted least squares, the last
// digits such that no value errs by 2 ulp.
constexpr float kSteep = 2.0625f;
constexpr float kBend[] = {4.667306542e-01f, 1.217684820e-01f, -2.255126461e-02f, -1.852928661e-02f, -3.183127847e-03f};
constexpr float kBendDivisor[] = {1.0f, 8.463221192e-01f, 3.444482982e-01f, 7.394188643e-02f, 7.168539800e-03f};

// max(z, 0) - a Phi(-a), a = |z|.
template <class V>
inline V gelu(V z) {
  const V a = absolute(z), square = a * a, half = splat<V>(-0.5);
  const Exponential<V> e(half * square, half * fused(a, a, -square));
  const V multiplier = polynomial<V>(kBendDivisor, a), steep = splat<V>(kSteep), two = splat<V>(2);
  const V line = fused(a, steep, two), line_lost = fused(a, steep, two - line);
  const V bend = fused(-line_lost, multiplier, a * polynomial<V>(kBend, a));
  const V divisor = fused(line, multiplier, -bend), divisor_lost = fused(line, multiplier, -divisor) - bend;
  const V inverse = splat<V>(1) / divisor, share = multiplier * inverse;
  const V left = fused(-share, divisor_lost, fused(-share, divisor, multiplier));
  const V tail = fused(a, share, a * fused(e.bent, share, left * inverse));
  return rectified(z, 0) - e.scale * tail;
}

// 1/2 + z * numerator(z^2) / denominator(z^2), to 2^-22 for |z| up to 6, where it is 0 or 1; by least squares.
constexpr float kSlope[] = {7.978851e-01f, -3.078602e-02f, 1.421169e-02f, 2.343596e-05f, 3.583314e-05f, 1.909098e-07f};
constexpr float kSlopeDivisor[] = {1.0f, 2.947548e-01f, 4.104772e-02f, 3.528002e-03f, 1.931416e-04f, 8.886869e-06f};

template <class V>
inline V gelu_slope(V z) {
  const V six = splat<V>(6), bounded = rectified(z > six ? six : z, -6), square = bounded * bounded;
  return fused(bounded, polynomial<V>(kSlope, square) / polynomial<V>(kSlopeDivisor, square), splat<V>(0.5));
}

}  // namespace divnorm::DIVNORM_ISA::quick
