// The values kernels compute with: one number, a vector or a Pair of vectors, and how they meet memory.
// Vectors are the compiler's own vector type, as wide as the instruction set this file is compiled for.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace divnorm::DIVNORM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
#if defined(__x86_64__) && !defined(__AVX2__)
constexpr bool kOldProcessors = true;
#else
constexpr bool kOldProcessors = false;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type sums are kept in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;

template <class V>
constexpr bool is_scalar = std::is_arithmetic_v<V>;

template <class A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);

// Twice the lanes, for bfloat16: the numbers at even places of a run and those at odd ones. A word of memory holds one
// of each, so they unpack and pack within their lane. Floats that meet a Pair lie in memory in the same order: the
// run's even places, then its odd ones.
struct Pair {
  Vec<float> even, odd;

  Pair& operator+=(const Pair& other) { return *this = {even + other.even, odd + other.odd}; }
  Pair& operator-=(const Pair& other) { return *this = {even - other.even, odd - other.odd}; }
};
inline Pair operator+(const Pair& a, const Pair& b) { return {a.even + b.even, a.odd + b.odd}; }
inline Pair operator-(const Pair& a, const Pair& b) { return {a.even - b.even, a.odd - b.odd}; }
inline Pair operator*(const Pair& a, const Pair& b) { return {a.even * b.even, a.odd * b.odd}; }

template <class V>
constexpr bool is_pair = std::is_same_v<V, Pair>;

// The type of one lane, and how many a value of type V holds.
template <class V>
struct Lane {
  using type = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
};
template <>
struct Lane<float> {
  using type = float;
};
template <>
struct Lane<double> {
  using type = double;
};
template <>
struct Lane<Pair> {
  using type = float;
};
template <class V>
constexpr int64_t kWidth = sizeof(V) / sizeof(typename Lane<V>::type);

typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));

template <class V, class Number>
inline V splat(Number value) {
  if constexpr (is_scalar<V>)
    return static_cast<V>(value);
  else if constexpr (is_pair<V>)
    return {splat<Vec<float>>(value), splat<Vec<float>>(value)};
  else
    return static_cast<typename Lane<V>::type>(value) - V{};  // value - 0 keeps a negative zero
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// float16 by integer arithmetic, for sets without a conversion instruction. U is uint32_t or a vector of it.
template <class F, class U>
inline F float_from_half(U half) {
  const U magnitude = (half & 0x7fffu) << 13;
  const U scaled = bit_cast<U>(bit_cast<F>(magnitude) * 0x1p112f);
  const U special = magnitude >= (31u << 23) ? U{} + 0x7f800000u : U{};
  return bit_cast<F>(scaled | special | ((half & 0x8000u) << 16));
}

// Round to nearest even. Values under the smallest normal half are rounded by an addition that aligns their bits.
template <class F, class U>
inline U half_from_float(F value) {
  const U bits = bit_cast<U>(value);
  const U sign = bits & 0x80000000u;
  const U magnitude = bits ^ sign;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U tiny = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
  const U finite = magnitude < (113u << 23) ? tiny : normal;
  const U special = magnitude > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  return (magnitude >= (143u << 23) ? special : finite) | (sign >> 16);
}

// The bits of a float, rounded to nearest even in their upper half. The lower half of a NaN must be zero, or it could
// round up to something else: so are those of bfloat16 inputs and of invalid operations, and quiet() makes those of
// parameters so.
template <class U, class F>
inline U rounded_to_bfloat(F value) {
  const U bits = bit_cast<U>(value);
  return bits + ((bits >> 16 & 1u) + 0x7fffu);
}

// The compilers' own conversions between vectors of 16 and 32 bits take twice the instructions.
inline Word widen(Half half) {
#if defined(__AVX512F__)
  return bit_cast<Word>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(half)));
#elif defined(__AVX2__)
  return bit_cast<Word>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(half)));
#else
  return __builtin_convertvector(half, Word);
#endif
}

inline Half low_halves(Word word) {
#if defined(__AVX512F__)
  return bit_cast<Half>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(word)));
#elif defined(__AVX2__)
  const __m256i bits = bit_cast<__m256i>(word);
  return bit_cast<Half>(_mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
#else
  return __builtin_convertvector(word, Half);
#endif
}

template <class V, class T>
inline V load(const T* p) {
  if constexpr (is_pair<V>) {
    if constexpr (std::is_same_v<T, float>)
      return {load<Vec<float>>(p), load<Vec<float>>(p + kLanes<float>)};
    else {
      static_assert(std::is_same_v<T, BFloat16>);
      Word words;
      __builtin_memcpy(&words, p, sizeof(words));
      return {bit_cast<Vec<float>>(words << 16), bit_cast<Vec<float>>(words & 0xffff0000u)};
    }
  } else if constexpr (std::is_floating_point_v<T>) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  } else if constexpr (is_scalar<V>) {
    if constexpr (std::is_same_v<T, BFloat16>)
      return bit_cast<float>(uint32_t{p->bits} << 16);
    else
      return float_from_half<float>(uint32_t{p->bits});
  } else {
    Half half;
    __builtin_memcpy(&half, p, sizeof(half));
    if constexpr (std::is_same_v<T, BFloat16>) return bit_cast<V>(widen(half) << 16);
#if defined(__AVX512F__)
    else
      return bit_cast<V>(_mm512_cvtph_ps(bit_cast<__m256i>(half)));
#elif defined(__AVX2__)
    else
      return bit_cast<V>(_mm256_cvtph_ps(bit_cast<__m128i>(half)));
#else
    else
      return float_from_half<V>(widen(half));
#endif
  }
}

template <class T>
inline Half narrow(Vec<float> v) {
  if constexpr (std::is_same_v<T, BFloat16>) return low_halves(rounded_to_bfloat<Word>(v) >> 16);
#if defined(__AVX512F__)
  else
    return bit_cast<Half>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  else
    return bit_cast<Half>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  else
    return low_halves(half_from_float<Vec<float>, Word>(v));
#endif
}

inline Word packed(const Pair& v) {
  return rounded_to_bfloat<Word>(v.even) >> 16 | (rounded_to_bfloat<Word>(v.odd) & 0xffff0000u);
}

template <class V, class T>
inline void store(T* p, V v) {
  if constexpr (is_pair<V> && std::is_same_v<T, float>) {
    store(p, v.even);
    store(p + kLanes<float>, v.odd);
  } else if constexpr (is_pair<V>) {
    static_assert(std::is_same_v<T, BFloat16>);
    const Word words = packed(v);
    __builtin_memcpy(p, &words, sizeof(words));
  } else if constexpr (std::is_floating_point_v<T>) {
    __builtin_memcpy(p, &v, sizeof(v));
  } else if constexpr (is_scalar<V>) {
    if constexpr (std::is_same_v<T, BFloat16>)
      p->bits = static_cast<uint16_t>(rounded_to_bfloat<uint32_t>(v) >> 16);
    else
      p->bits = static_cast<uint16_t>(half_from_float<float, uint32_t>(v));
  } else {
    const Half half = narrow<T>(v);
    __builtin_memcpy(p, &half, sizeof(half));
  }
}

// Writes past the cache; p is aligned to the vector's size in T. Other sets than x86's store as usual.
template <int Bytes, class Bits>
inline void stream_bits(void* p, Bits bits) {
#if defined(__AVX512F__)
  if constexpr (Bytes == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), bit_cast<__m512i>(bits));
#endif
#if defined(__AVX2__)
  if constexpr (Bytes == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(bits));
#endif
#if defined(__x86_64__)
  if constexpr (Bytes == 16) return _mm_stream_si128(static_cast<__m128i*>(p), bit_cast<__m128i>(bits));
#endif
  __builtin_memcpy(p, &bits, sizeof(bits));
}

template <bool Stream, class V, class T>
inline void write(T* p, V v) {
  if constexpr (!Stream || is_scalar<V>)
    store(p, v);
  else if constexpr (is_pair<V>)
    stream_bits<kVectorBytes>(p, packed(v));
  else if constexpr (std::is_floating_point_v<T>)
    stream_bits<kVectorBytes>(p, v);
  else
    stream_bits<kVectorBytes / 2>(p, narrow<T>(v));
}

inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Asks for the same place in the next `Rows` rows: they are too far apart for the processor to see them coming.
template <int Rows, class T>
inline void prefetch_next(const T* p, int64_t stride) {
  for (int r = 0; r < Rows; ++r) __builtin_prefetch(p + (Rows + r) * stride);
}

// Asks for all lines of the Bytes bytes from p on.
template <int64_t Bytes, class T>
inline void prefetch_lines(const T* p) {
  for (int64_t at = 0; at < Bytes; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + at);
}

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

template <class V>
inline V absolute(V v) {
  return bit_cast<V>(bit_cast<Bits<V>>(v) & ~bit_cast<Bits<V>>(splat<V>(-0.0)));
}

// Of a NaN it is zero, as torch's.
template <class V>
inline V sign(V v) {
  const V zero = splat<V>(0), one = splat<V>(1);
  return v > zero ? one : (v < zero ? -one : zero);
}

// v where it is finite and zero elsewhere.
template <class V>
inline V finite_or_zero(V v) {
  return v - v == splat<V>(0) ? v : splat<V>(0);
}

// v, but floor where v is below it.
template <class V, class A>
inline V rectified(V v, A floor) {
  if constexpr (is_pair<V>)
    return {rectified(v.even, floor), rectified(v.odd, floor)};
  else
    return v < splat<V>(floor) ? splat<V>(floor) : v;
}

// grad, but zero where y is not above floor.
template <class V, class A>
inline V passed(V grad, V y, A floor) {
  if constexpr (is_pair<V>)
    return {passed(grad.even, y.even, floor), passed(grad.odd, y.odd, floor)};
  else
    return y <= splat<V>(floor) ? splat<V>(0) : grad;
}

// The larger of v and least, but a NaN where v is one, and least where that is one.
template <class V>
inline V raised(V v, V least) {
  if constexpr (is_pair<V>)
    return {raised(v.even, least.even), raised(v.odd, least.odd)};
  else
    return v > least || v != v ? v : least;
}

// grad, but zero where v is at most bound: nowhere where one of them is a NaN.
template <class V>
inline V above(V grad, V v, V bound) {
  if constexpr (is_pair<V>)
    return {above(grad.even, v.even, bound.even), above(grad.odd, v.odd, bound.odd)};
  else
    return v <= bound ? splat<V>(0) : grad;
}

// The rest of it.
template <class V>
inline V not_above(V grad, V v, V bound) {
  if constexpr (is_pair<V>)
    return {not_above(grad.even, v.even, bound.even), not_above(grad.odd, v.odd, bound.odd)};
  else
    return v <= bound ? grad : splat<V>(0);
}

inline Pair absolute(const Pair& v) { return {absolute(v.even), absolute(v.odd)}; }
inline Pair sign(const Pair& v) { return {sign(v.even), sign(v.odd)}; }
inline Pair finite_or_zero(const Pair& v) { return {finite_or_zero(v.even), finite_or_zero(v.odd)}; }

}  // namespace divnorm::DIVNORM_ISA
