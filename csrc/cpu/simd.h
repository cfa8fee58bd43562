// Lanes: the same kernel text runs on a vector (the main loop) and on one number (the tail).
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

typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));

template <class V, class Number>
inline V splat(Number value) {
  if constexpr (is_scalar<V>)
    return static_cast<V>(value);
  else
    return static_cast<std::remove_reference_t<decltype(V{}[0])>>(value) - V{};  // value - 0 keeps a negative zero
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

// Round to nearest even. The lower half of a NaN must be zero, or it could round up to something else: so are those of
// bfloat16 inputs and of invalid operations, and Values makes those of parameters so.
template <class U, class F>
inline U bfloat_from_float(F value) {
  const U bits = bit_cast<U>(value);
  return (bits + ((bits >> 16 & 1u) + 0x7fffu)) >> 16;
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
  if constexpr (std::is_floating_point_v<T>) {
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
  if constexpr (std::is_same_v<T, BFloat16>) return low_halves(bfloat_from_float<Word>(v));
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

template <class V, class T>
inline void store(T* p, V v) {
  if constexpr (std::is_floating_point_v<T>) {
    __builtin_memcpy(p, &v, sizeof(v));
  } else if constexpr (is_scalar<V>) {
    if constexpr (std::is_same_v<T, BFloat16>)
      p->bits = static_cast<uint16_t>(bfloat_from_float<uint32_t>(v));
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

// Calls body(V{}, i) over 0..count: vectors first, then single numbers.
template <class A, class Body>
inline void for_lanes(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) body(Vec<A>{}, i);
  for (; i < count; ++i) body(A{}, i);
}

// The same, with single numbers first until out + i is aligned for streaming stores.
template <class A, bool Stream, class T, class Body>
inline void for_lanes_writing(const T* out, int64_t count, Body&& body) {
  int64_t i = 0;
  if constexpr (Stream) {
    constexpr uintptr_t bytes = kLanes<A> * sizeof(T);
    for (; i < count && reinterpret_cast<uintptr_t>(out + i) % bytes != 0; ++i) body(A{}, i);
  }
  for (; i + kLanes<A> <= count; i += kLanes<A>) body(Vec<A>{}, i);
  for (; i < count; ++i) body(A{}, i);
}

template <class V>
inline V absolute(V v) {
  return v < splat<V>(0) ? -v : v;
}

template <class V>
inline V sign(V v) {
  const V zero = splat<V>(0), one = splat<V>(1);
  return v > zero ? one : (v < zero ? -one : v);
}

// The lower and the upper lanes of a vector, added.
template <class A, int Lanes, class V, size_t... I>
inline auto fold(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, I...) + __builtin_shufflevector(v, v, (I + Lanes / 2)...);
}

// Sum of the lanes in a fixed order: halves are added until one lane is left.
template <class A, int Lanes = kLanes<A>, class V>
inline A lane_sum(V v) {
  if constexpr (Lanes == 2)
    return v[0] + v[1];
  else
    return lane_sum<A, Lanes / 2>(fold<A, Lanes>(v, std::make_index_sequence<Lanes / 2>{}));
}

// Neighbouring runs of `Run` lanes of a and of b, added in pairs: a's sums go to even runs, b's to odd ones.
template <int Run, class V, size_t... I>
inline V pair_sums(V a, V b, std::index_sequence<I...>) {
  constexpr int lanes = sizeof...(I);
  constexpr auto from = [](int i, int half) {
    const int run = i / Run, source = run % 2 == 0 ? 0 : lanes;
    return source + (run / 2 * 2 + half) * Run + i % Run;
  };
  return __builtin_shufflevector(a, b, from(I, 0)...) + __builtin_shufflevector(a, b, from(I, 1)...);
}

// The lane sums of four vectors at once.
template <class A>
inline void lane_sums(const Vec<A> (&v)[4], A (&sums)[4]) {
  if constexpr (kLanes<A> >= 4) {
    constexpr std::make_index_sequence<kLanes<A>> all{};
    const Vec<A> four = pair_sums<2>(pair_sums<1>(v[0], v[1], all), pair_sums<1>(v[2], v[3], all), all);
    for (int i = 0; i < 4; ++i) sums[i] = four[i];
    for (int64_t lane = 4; lane < kLanes<A>; ++lane) sums[lane % 4] += four[lane];
  } else {
    for (int i = 0; i < 4; ++i) sums[i] = lane_sum<A>(v[i]);
  }
}

// Several running sums, each over vectors and single numbers.
template <class A, int Count>
struct Totals {
  Vec<A> lanes[Count] = {};
  A tail[Count] = {};

  template <class V>
  void add(int which, V v) {
    if constexpr (is_scalar<V>)
      tail[which] += v;
    else
      lanes[which] += v;
  }
  A value(int which) const { return lane_sum<A>(lanes[which]) + tail[which]; }
  void values(A (&out)[Count]) const {
    if constexpr (Count == 4) {
      lane_sums<A>(lanes, out);
      for (int i = 0; i < Count; ++i) out[i] += tail[i];
    } else {
      for (int i = 0; i < Count; ++i) out[i] = value(i);
    }
  }
};

}  // namespace divnorm::DIVNORM_ISA
