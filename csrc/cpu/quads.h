// Squares of numbers turned: rows of memory become vectors that have one number of each row, and back.
#pragma once

#include "simd.h"

namespace divnorm::DIVNORM_ISA {

template <class A>
struct QuadOf {
  typedef A type __attribute__((vector_size(16)));
};
// What a processor shuffles at little cost.
template <class A>
using Quad = typename QuadOf<A>::type;
template <class A>
constexpr int64_t kQuad = 16 / sizeof(A);

template <class V, size_t... I>
inline auto joined(V low, V high, std::index_sequence<I...>) {
  return __builtin_shufflevector(low, high, I...);
}

// The quads at `number` of rows[0], rows[kQuad], ..., side by side.
template <class A, int Count = kLanes<A> / kQuad<A>>
inline auto load_quads(const A* const* rows, int64_t number) {
  if constexpr (Count == 1) {
    Quad<A> quad;
    __builtin_memcpy(&quad, *rows + number, sizeof(quad));
    return quad;
  } else {
    return joined(load_quads<A, Count / 2>(rows, number), load_quads<A, Count / 2>(rows + Count / 2 * kQuad<A>, number),
                  std::make_index_sequence<Count * kQuad<A>>{});
  }
}

template <int First, class V, size_t... I>
inline auto part(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (First + I)...);
}

template <class A, int At = 0>
inline void store_quads(Vec<A> v, A* const* rows, int64_t number) {
  const Quad<A> quad = part<At * kQuad<A>>(v, std::make_index_sequence<kQuad<A>>{});
  __builtin_memcpy(rows[At * kQuad<A>] + number, &quad, sizeof(quad));
  if constexpr ((At + 1) * kQuad<A> < kLanes<A>) store_quads<A, At + 1>(v, rows, number);
}

// In every quad, runs of `Run` numbers by turns from the lower (or upper) halves of a's and b's.
template <int Run, bool Upper, class V, size_t... I>
inline V zipped(V a, V b, std::index_sequence<I...>) {
  constexpr int lanes = sizeof...(I), quad = 16 * lanes / static_cast<int>(sizeof(V));
  constexpr auto from = [](int i) {
    const int run = i % quad / Run, number = (run / 2 + (Upper ? quad / Run / 2 : 0)) * Run + i % Run;
    return i / quad * quad + number + run % 2 * lanes;
  };
  return __builtin_shufflevector(a, b, from(I)...);
}

// Number i of quad j of vector k, for number k of quad j of vector i.
template <class A>
inline void transpose_quads(Vec<A> (&v)[kQuad<A>]) {
  using V = Vec<A>;
  constexpr std::make_index_sequence<kLanes<A>> all{};
  if constexpr (kQuad<A> == 2) {
    const V low = zipped<1, false, V>(v[0], v[1], all);
    v[1] = zipped<1, true, V>(v[0], v[1], all);
    v[0] = low;
  } else {
    const V a = zipped<1, false, V>(v[0], v[1], all), b = zipped<1, true, V>(v[0], v[1], all);
    const V c = zipped<1, false, V>(v[2], v[3], all), d = zipped<1, true, V>(v[2], v[3], all);
    v[0] = zipped<2, false, V>(a, c, all);
    v[1] = zipped<2, true, V>(a, c, all);
    v[2] = zipped<2, false, V>(b, d, all);
    v[3] = zipped<2, true, V>(b, d, all);
  }
}

}  // namespace divnorm::DIVNORM_ISA
