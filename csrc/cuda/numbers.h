// Half types, short runs of numbers that move in one access, and the type sums are kept in.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.h"
#include "program.h"

namespace divnorm::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

// Count numbers, moved at once.
template <class T, int Count>
struct alignas(Count * sizeof(T) < kVectorBytes ? Count * sizeof(T) : kVectorBytes) Pack {
  T at[Count];
};

__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(bfloat16 value) { return device::from_bits(static_cast<uint32_t>(value.bits) << 16); }
__device__ inline float widen(float16 value) { return device::float_of_half(value.bits); }

template <class T>
__device__ inline T narrow(Acc<T> value) {
  return value;
}
template <>
__device__ inline bfloat16 narrow<bfloat16>(float value) {
  return {device::bfloat16_of(value)};
}
template <>
__device__ inline float16 narrow<float16>(float value) {
  return {device::half_of(value)};
}

// Two numbers of a half type in a word, the first in its low half.
template <class T>
struct Pair;
template <>
struct Pair<bfloat16> {
  static __device__ void widen(uint32_t word, float& first, float& second) {
    first = device::from_bits(word << 16);
    second = device::from_bits(word & 0xffff0000u);
  }
  static __device__ uint32_t narrow(float first, float second) { return device::bfloat16s_of(first, second); }
};
template <>
struct Pair<float16> {
  static __device__ void widen(uint32_t word, float& first, float& second) {
    device::floats_of_halves(word, first, second);
  }
  static __device__ uint32_t narrow(float first, float second) { return device::halves_of(first, second); }
};

template <class T, int Count>
__device__ inline Pack<Acc<T>, Count> widen(const Pack<T, Count>& pack) {
  Pack<Acc<T>, Count> wide;
  if constexpr (sizeof(T) == 2 && Count % 2 == 0) {
    for (int i = 0; i < Count; i += 2) {
      uint32_t word;
      memcpy(&word, pack.at + i, sizeof word);
      Pair<T>::widen(word, wide.at[i], wide.at[i + 1]);
    }
  } else {
    for (int i = 0; i < Count; ++i) wide.at[i] = widen(pack.at[i]);
  }
  return wide;
}
template <class T, int Count>
__device__ inline Pack<T, Count> narrow(const Pack<Acc<T>, Count>& wide) {
  Pack<T, Count> pack;
  if constexpr (sizeof(T) == 2 && Count % 2 == 0) {
    for (int i = 0; i < Count; i += 2) {
      const uint32_t word = Pair<T>::narrow(wide.at[i], wide.at[i + 1]);
      memcpy(pack.at + i, &word, sizeof word);
    }
  } else {
    for (int i = 0; i < Count; ++i) pack.at[i] = narrow<T>(wide.at[i]);
  }
  return pack;
}

template <class A>
__device__ inline bool finite(A value) {
  return value - value == A(0);
}

// Element i of a parameter in any dtype.
template <class A>
__device__ inline A read(const Parameter& parameter, int64_t i) {
  const void* data = parameter.data;
  switch (parameter.dtype) {
    case Dtype::float64: return static_cast<A>(device::load(static_cast<const double*>(data) + i));
    case Dtype::float32: return static_cast<A>(device::load(static_cast<const float*>(data) + i));
    case Dtype::bfloat16: return static_cast<A>(widen(device::load(static_cast<const bfloat16*>(data) + i)));
    default: return static_cast<A>(widen(device::load(static_cast<const float16*>(data) + i)));
  }
}

template <class A>
__device__ inline void write(const Parameter& parameter, int64_t i, A value) {
  switch (parameter.dtype) {
    case Dtype::float64: return device::store(static_cast<double*>(parameter.data) + i, static_cast<double>(value));
    case Dtype::float32: return device::store(static_cast<float*>(parameter.data) + i, static_cast<float>(value));
    case Dtype::bfloat16:
      return device::store(static_cast<bfloat16*>(parameter.data) + i, narrow<bfloat16>(static_cast<float>(value)));
    default:
      return device::store(static_cast<float16*>(parameter.data) + i, narrow<float16>(static_cast<float>(value)));
  }
}

}  // namespace divnorm::cuda
