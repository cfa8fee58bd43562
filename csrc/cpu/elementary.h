// What the smooth activations are made of: numbers in two parts, polynomials and exponentials.
#pragma once

#include "simd.h"

namespace divnorm::DIVNORM_ISA {

// Coefficients, the constant first. exponential: (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, to 2^-28 and 2^-58 of
// exp(r), by Remez exchange. numerator / denominator: what bends in normal_divisor(), to 2^-28 and less than 2^-55, by
// weighted least squares; all are positive, so that no digits cancel.
template <class A>
struct Series;

template <>
struct Series<float> {
  static constexpr uint32_t kMantissa = 23, kBias = 127;
  static constexpr uint32_t kHead = 0xfffff000u;  // of the bits: a number whose square is exact
  static constexpr float kRound = 0x1.8p23f;      // added, it leaves an integer in the last bits
  static constexpr float kLog2e = 0x1.715476p0f, kLn2Head = 0x1.63p-1f, kLn2Rest = -0x1.bd0106p-13f;
  // Beyond these sizes of z the product with what decays is zero.
  static constexpr float kLogisticEnd = 120, kNormalEnd = 14.5f, kTanhEnd = 11.3f;
  static constexpr float kExponentEnd = 87;  // exp() and its inverse are normal numbers up to here
  static constexpr float exponential[] = {0.49999993432f, 0.166665203994f, 0.0416683907735f, 0.00836874508979f,
                                          0.00138145408897f};
  static constexpr float numerator[] = {0.3633802287f, 0.2717106007f, 0.09758745448f, 0.01872300598f, 0.001648075508f};
  static constexpr float denominator[] = {1.0f,          1.04771102f,    0.5302051986f,
                                          0.1549201745f, 0.02605625168f, 0.002065528033f};
};

template <>
struct Series<double> {
  static constexpr uint64_t kMantissa = 52, kBias = 1023, kHead = 0xfffffffff8000000u;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLog2e = 0x1.71547652b82fep+0, kLn2Head = 0x1.62e42fefa3000p-1,
                          kLn2Rest = 0x1.3de6af278ece6p-42;
  static constexpr double kLogisticEnd = 760, kNormalEnd = 38.9, kTanhEnd = 21.7;
  static constexpr double kExponentEnd = 708;
  static constexpr double exponential[] = {0.5,
                                           0.166666666666664115,
                                           0.041666666666529733,
                                           0.0083333333334949808,
                                           0.00138888889437589294,
                                           0.000198412695057648937,
                                           0.0000248014929505516978,
                                           2.75575868127536661e-6,
                                           2.76303059621272359e-7,
                                           2.50000157818525591e-8};
  static constexpr double numerator[] = {0.3633802276324186457,  0.5014227422807254653,    0.3435946154341132527,
                                         0.1503398707836863779,  0.04584798390660385209,   0.01006268193925910978,
                                         0.00158861833940967212, 0.0001744577034217669744, 0.00001217699092234501683,
                                         4.172429100333539695e-7};
  static constexpr double denominator[] = {1.0,
                                           1.679864513626496762,
                                           1.396836692731101917,
                                           0.7438117296675479265,
                                           0.2784156720191913628,
                                           0.07622200345894016056,
                                           0.01544034754639700934,
                                           0.002288766896362999066,
                                           0.0002385993053511563259,
                                           0.00001591699850298298901,
                                           5.229364378413704382e-7};
};

// a * b + c, rounded once where the set can.
template <class V>
inline V fused(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return bit_cast<V>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
  if constexpr (std::is_same_v<V, Vec<double>>)
    return bit_cast<V>(_mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return bit_cast<V>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
  if constexpr (std::is_same_v<V, Vec<double>>)
    return bit_cast<V>(_mm256_fmadd_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b), bit_cast<__m256d>(c)));
#endif
  return a * b + c;
}

// A number and what its rounding lost.
template <class V>
struct Exact {
  V sum, lost;
};

// Every Step-th coefficient's, from First on, by x to that power.
template <int First, int Step, class V, class A, int Count>
inline V every(const A (&coefficients)[Count], V x) {
  constexpr int last = First + (Count - 1 - First) / Step * Step;
  V sum = splat<V>(coefficients[last]);
  for (int i = last - Step; i >= First; i -= Step) sum = sum * x + splat<V>(coefficients[i]);
  return sum;
}

// Its even and its odd part side by side: half as long a chain, and fewer roundings on top of each other.
template <class V, class A, int Count>
inline V polynomial(const A (&coefficients)[Count], V x) {
  const V square = x * x;
  return every<0, 2>(coefficients, square) + x * every<1, 2>(coefficients, square);
}

constexpr long double kLinear = 1.59576912160573071175978423973752L;  // 2 sqrt(2 / pi)
constexpr long double kCubic = 0.0713548162726002487763387522799L;    // 0.044715 times it

// A constant and what its rounding lost.
template <class V>
inline Exact<V> constant(long double value) {
  using A = typename Lane<V>::type;
  return {splat<V>(static_cast<A>(value)), splat<V>(static_cast<A>(value - static_cast<A>(value)))};
}

}  // namespace divnorm::DIVNORM_ISA
