// The smooth activations and their slopes, of vectors and of single numbers.
//
// Largest errors found, in ulp of the value itself, subnormal ones included:
//
//                 float32                   float64
//                 silu  gelu  gelu_tanh     silu  gelu  gelu_tanh
//   avx2, avx512   1.7   1.8        1.9      2.8   2.9        3.0
//   baseline       2.9   3.0        110      2.9   3.6       1100
//
// The baseline cannot multiply and add in one rounding; it loses digits in the tail of gelu_tanh. Slopes are as exact
// as numbers near one can be, not in their own ulp where they pass through zero; silu and gelu_tanh for a half type are
// within a few ulp of float32, and zero where they are below its normal numbers. What is not finite is as torch has it:
// of -inf they are NaN, and so are the slopes of both infinities. tests/test_activations.py measures.
#include "epilogue.h"

namespace divnorm::DIVNORM_ISA {

namespace {

template <class V>
struct BitsOf {
  typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
  using type = std::conditional_t<std::is_same_v<typename Lane<V>::type, double>, Wide, Word>;
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};
template <class V>
using Bits = typename BitsOf<V>::type;

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
#if defined(__FMA__)
  if constexpr (std::is_same_v<V, float>) return __builtin_fmaf(a, b, c);
  if constexpr (std::is_same_v<V, double>) return __builtin_fma(a, b, c);
#endif
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

template <class V>
inline Exact<V> exact_sum(V a, V b) {
  const V sum = a + b, second = sum - a;
  return {sum, (a - (sum - second)) + (b - second)};
}

// The same with a b whose size is at most 1.
template <class V>
inline Exact<V> one_and(V b) {
  const V one = splat<V>(1), sum = one + b;
  return {sum, b - (sum - one)};
}

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

// |z|, but `end` where it is larger or z is a NaN.
template <class V, class A>
inline V size_within(V z, A end) {
  const V size = absolute(z);
  return size < splat<V>(end) ? size : splat<V>(end);
}

// exp(x + rest) = mantissa * first * second. What multiplies the mantissa first rounds once also where the product with
// both powers of two is subnormal.
template <class V>
struct Exponential {
  V mantissa, first, second;

  V value() const { return mantissa * first * second; }
  V times(V v) const { return v * first * second; }
};

// x is at most 0 and far from the smallest exponent's square, `rest` is small beside it.
template <class V>
inline Exponential<V> exponential(V x, V rest) {
  using S = Series<typename Lane<V>::type>;
  using U = Bits<V>;
  const V round = splat<V>(S::kRound), shifted = (x + rest) * splat<V>(S::kLog2e) + round;
  const V power = shifted - round;
  const V r = ((x - power * splat<V>(S::kLn2Head)) - power * splat<V>(S::kLn2Rest)) + rest;
  const U exponent = bit_cast<U>(shifted) - bit_cast<U>(round) + 2 * S::kBias, half = exponent >> 1;
  return {splat<V>(1) + (r + r * r * polynomial<V>(S::exponential, r)), bit_cast<V>(half << S::kMantissa),
          bit_cast<V>((exponent - half) << S::kMantissa)};
}

// exp(x) for x between -kExponentEnd and kExponentEnd, to a few ulp.
template <class V>
inline V quick_exponential(V x) {
  using S = Series<typename Lane<V>::type>;
  using U = Bits<V>;
  const V round = splat<V>(S::kRound), shifted = x * splat<V>(S::kLog2e) + round, power = shifted - round;
  const V r = (x - power * splat<V>(S::kLn2Head)) - power * splat<V>(S::kLn2Rest);
  const V mantissa = splat<V>(1) + (r + r * r * polynomial<V>(S::exponential, r));
  return bit_cast<V>(bit_cast<U>(mantissa) + (bit_cast<U>(shifted) << S::kMantissa));
}

// z, but `end` beyond it on either side, and where z is a NaN.
template <class V, class A>
inline V within(V z, A end) {
  const V below = z < splat<V>(end) ? z : splat<V>(end);
  return below > splat<V>(-end) ? below : splat<V>(-end);
}

// 1 / (1 + exp(-u)) and 1 / (1 + exp(u)), to a few ulp of one.
template <class V>
struct Shares {
  V share, other;

  explicit Shares(V u) {
    const V e = quick_exponential<V>(-within(u, Series<typename Lane<V>::type>::kExponentEnd));
    share = splat<V>(1) / (splat<V>(1) + e);
    other = e * share;
  }
};

// A number that changes nothing, but a NaN where z is -inf or a NaN.
template <class V>
inline V nothing_below(V z) {
  return splat<V>(0) * (z > splat<V>(0) ? splat<V>(0) : z);
}

// product / divisor, and what that lacks of (product + lost) / (divisor + its own).
template <class V>
inline Exact<V> quotient(V product, V lost, const Exact<V>& divisor) {
  const V inverse = splat<V>(1) / divisor.sum, rough = product * inverse;
  const V left = fused<V>(-rough, divisor.sum, product) + lost;
  return {rough, fused<V>(-rough, divisor.lost, left) * inverse};
}

// z / (1 + exp(-(steepened + rest))), where `size` is |z| below `end` and `steepened` goes with it.
template <class V, class A>
inline V logistic_product(V z, V size, A end, V steepened, V rest) {
  const auto e = exponential<V>(-steepened, -rest);
  const V factor = z < splat<V>(0) ? e.mantissa : splat<V>(1), product = size * factor;
  const Exact<V> y = quotient<V>(product, fused<V>(size, factor, -product), one_and<V>(e.value()));
  const V found = y.sum + y.lost, positive = z > splat<V>(end) ? z : found;
  return (z < splat<V>(0) ? -e.times(found) : positive) + nothing_below(z);
}

// The same for a half type, which shows half of the digits.
template <class V, class A>
inline V rounded_product(V z, A end, V steepened) {
  return z > splat<V>(-end) ? z * Shares<V>(steepened).share : nothing_below(z);
}

// Its slope at z, of which `bounded` is what counts, where that of `steepened` is `steepness`.
template <class V>
inline V logistic_slope(V z, V bounded, V steepened, V steepness) {
  const Shares<V> of(steepened);
  return of.share + of.share * of.other * (bounded * steepness) + splat<V>(0) * z;
}

template <class V>
inline V silu(V z) {
  constexpr auto end = Series<typename Lane<V>::type>::kLogisticEnd;
  const V size = size_within(z, end);
  return logistic_product(z, size, end, size, splat<V>(0));
}

template <class V>
inline V silu_slope(V z) {
  const V bounded = within(z, Series<typename Lane<V>::type>::kExponentEnd);
  return logistic_slope(z, bounded, bounded, splat<V>(1));
}

template <class V>
inline V rounded_silu(V z) {
  return rounded_product(z, Series<typename Lane<V>::type>::kExponentEnd, z);
}

// A constant and what its rounding lost.
template <class V>
inline Exact<V> constant(long double value) {
  using A = typename Lane<V>::type;
  return {splat<V>(static_cast<A>(value)), splat<V>(static_cast<A>(value - static_cast<A>(value)))};
}

constexpr long double kLinear = 1.59576912160573071175978423973752L;  // 2 sqrt(2 / pi)
constexpr long double kCubic = 0.0713548162726002487763387522799L;    // 0.044715 times it
constexpr long double kDensity = 0.398942280401432677939946059934L;   // 1 / sqrt(2 pi)

// By 1 + tanh(u) = 2 / (1 + exp(-2 u)). 2 u is kept in two numbers: what it lacks, exp() would show.
template <class V>
inline V gelu_tanh(V z) {
  constexpr auto end = Series<typename Lane<V>::type>::kTanhEnd;
  const V size = size_within(z, end);
  const auto linear = constant<V>(kLinear), cubic = constant<V>(kCubic);
  const V square = size * size, square_rest = fused<V>(size, size, -square);
  const V bent = cubic.sum * square, bent_rest = fused<V>(cubic.sum, square, -bent) + cubic.sum * square_rest;
  const Exact<V> slope = exact_sum(linear.sum, bent);
  const V rest = slope.lost + bent_rest + (linear.lost + cubic.lost * square);
  const V steepened = size * slope.sum;
  return logistic_product<V>(z, size, end, steepened, fused<V>(size, slope.sum, -steepened) + size * rest);
}

template <class V>
inline V gelu_tanh_slope(V z) {
  const V bounded = within(z, Series<typename Lane<V>::type>::kTanhEnd);
  const V linear = splat<V>(kLinear), bent = splat<V>(kCubic) * bounded * bounded;
  return logistic_slope<V>(z, bounded, bounded * (linear + bent), linear + splat<V>(3) * bent);
}

template <class V>
inline V rounded_gelu_tanh(V z) {
  constexpr auto end = Series<typename Lane<V>::type>::kTanhEnd;
  return rounded_product<V>(z, end, z * (splat<V>(kLinear) + splat<V>(kCubic) * z * z));
}

// exp(-size^2 / 2), the square in two parts of which the larger is exact.
template <class V>
inline Exponential<V> bell(V size) {
  using U = Bits<V>;
  using S = Series<typename Lane<V>::type>;
  const V half = splat<V>(-0.5), head = bit_cast<V>(bit_cast<U>(size) & S::kHead);
  return exponential<V>(half * head * head, half * (size - head) * (size + head));
}

// The divisor of exp(-size^2 / 2) / sqrt(2 pi) for the normal distribution below -size: size + 2 density less what is a
// sixth of it at most, which may therefore be rounded more often.
template <class V>
inline Exact<V> normal_divisor(V size) {
  using S = Series<typename Lane<V>::type>;
  const auto start = constant<V>(2 * kDensity), line = exact_sum(size, start.sum);
  const V bend = size * (polynomial<V>(S::numerator, size) / polynomial<V>(S::denominator, size));
  const V sum = line.sum - bend;
  return {sum, ((line.sum - sum) - bend) + (line.lost + start.lost)};
}

template <class V>
inline V gelu(V z) {
  const V size = size_within(z, Series<typename Lane<V>::type>::kNormalEnd);
  const auto e = bell(size);
  const auto density = constant<V>(kDensity);
  const V product = e.mantissa * density.sum;
  const V lost = fused<V>(e.mantissa, density.lost, fused<V>(e.mantissa, density.sum, -product));
  const Exact<V> found = quotient<V>(product, lost, normal_divisor(size));
  const V tail = fused<V>(size, found.sum, size * found.lost);
  return (z < splat<V>(0) ? -e.times(tail) : z - e.times(tail)) + nothing_below(z);
}

template <class V>
inline V gelu_slope(V z) {
  const V size = size_within(z, Series<typename Lane<V>::type>::kNormalEnd), density = splat<V>(kDensity);
  const V negative = bell(size).value() * density * (splat<V>(1) / normal_divisor(size).sum - size);
  return (z < splat<V>(0) ? negative : splat<V>(1) - negative) + splat<V>(0) * z;
}

template <class V, class Function>
inline void each(V* z, int count, Function&& function) {
  for (int i = 0; i < count; ++i) z[i] = function(z[i]);
}

}  // namespace

template <class V>
void smooth_values(V* z, int count, Activation activation, bool rounded) {
  if (activation == Activation::gelu) return each(z, count, [](V at) { return gelu(at); });
  const bool tanh = activation == Activation::gelu_tanh;
  if (rounded)
    tanh ? each(z, count, [](V at) { return rounded_gelu_tanh(at); })
         : each(z, count, [](V at) { return rounded_silu(at); });
  else
    tanh ? each(z, count, [](V at) { return gelu_tanh(at); }) : each(z, count, [](V at) { return silu(at); });
}

template <class V>
void smooth_slopes(V* z, int count, Activation activation) {
  switch (activation) {
    case Activation::silu: return each(z, count, [](V at) { return silu_slope(at); });
    case Activation::gelu: return each(z, count, [](V at) { return gelu_slope(at); });
    default: return each(z, count, [](V at) { return gelu_tanh_slope(at); });
  }
}

template void smooth_values<float>(float*, int, Activation, bool);
template void smooth_values<double>(double*, int, Activation, bool);
template void smooth_values<Vec<float>>(Vec<float>*, int, Activation, bool);
template void smooth_values<Vec<double>>(Vec<double>*, int, Activation, bool);
template void smooth_slopes<float>(float*, int, Activation);
template void smooth_slopes<double>(double*, int, Activation);
template void smooth_slopes<Vec<float>>(Vec<float>*, int, Activation);
template void smooth_slopes<Vec<double>>(Vec<double>*, int, Activation);

}  // namespace divnorm::DIVNORM_ISA
