// The smooth activations and their slopes for numbers of every size, what is not finite among them.
#pragma once

#include "elementary.h"

namespace divnorm::DIVNORM_ISA::exact {

constexpr long double kDensity = 0.398942280401432677939946059934L;  // 1 / sqrt(2 pi)

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

// z, but `end` beyond it on either side, and where z is a NaN.
template <class V, class A>
inline V within(V z, A end) {
  const V below = z < splat<V>(end) ? z : splat<V>(end);
  return below > splat<V>(-end) ? below : splat<V>(-end);
}

// exp(x) for x between -kExponentEnd and kExponentEnd, to a few ulp.
template <class V>
inline V bounded_exponential(V x) {
  using S = Series<typename Lane<V>::type>;
  using U = Bits<V>;
  const V round = splat<V>(S::kRound), shifted = x * splat<V>(S::kLog2e) + round, power = shifted - round;
  const V r = (x - power * splat<V>(S::kLn2Head)) - power * splat<V>(S::kLn2Rest);
  const V mantissa = splat<V>(1) + (r + r * r * polynomial<V>(S::exponential, r));
  return bit_cast<V>(bit_cast<U>(mantissa) + (bit_cast<U>(shifted) << S::kMantissa));
}

// 1 / (1 + exp(-u)) and 1 / (1 + exp(u)), to a few ulp of one.
template <class V>
struct Shares {
  V share, other;

  explicit Shares(V u) {
    const V e = bounded_exponential<V>(-within(u, Series<typename Lane<V>::type>::kExponentEnd));
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

}  // namespace divnorm::DIVNORM_ISA::exact
