// Loops over lanes and sums of them: the same kernel text runs on vectors (the main loop) and on one number (the tail).
#pragma once

#include "simd.h"
#include "unit.h"

namespace divnorm::DIVNORM_ISA {

// Calls body with every flag as a type, so that a kernel's loops are compiled for what it decides once.
template <class Body>
inline auto specialize(Body&& body) {
  return body();
}
template <class Body, class... Flags>
inline auto specialize(Body&& body, bool flag, Flags... flags) {
  const auto given = [&](auto first) {
    return specialize([&](auto... rest) { return body(first, rest...); }, flags...);
  };
  return flag ? given(std::true_type{}) : given(std::false_type{});
}

// The same, the first flag taken for false unless Both.
template <bool Both, class Body, class... Flags>
inline auto specialize_if(Body&& body, [[maybe_unused]] bool flag, Flags... flags) {
  if constexpr (Both)
    return specialize(body, flag, flags...);
  else
    return specialize([&](auto... rest) { return body(std::false_type{}, rest...); }, flags...);
}

// Whether kernels of a type are compiled to serve every call, few and slower for the plain ones: those of float64,
// which is for checks, and all for x86 processors without AVX2.
template <class T>
constexpr bool kGeneral = kOldProcessors || std::is_same_v<T, double>;

// Whether outputs of a type may bypass the cache.
template <class T>
constexpr bool kStreams = !kGeneral<T>;

// In a loop over the few numbers that fill no vector: the compiler is not to make vectors of them, which is most of
// what it would compile.
inline void one_by_one() { asm volatile(""); }

// Calls body(V{}, i) over 0..count while whole values of type V fit, then with narrower ones down to single numbers.
template <class V, class Body>
inline void for_lanes(int64_t count, Body&& body, int64_t i = 0) {
  using Number = typename Lane<V>::type;
  for (; i + kWidth<V> <= count; i += kWidth<V>) body(V{}, i);
  if constexpr (is_pair<V>)
    if (i + kLanes<Number> <= count) {
      body(Vec<Number>{}, i);
      i += kLanes<Number>;
    }
  for (; i < count; ++i) {
    one_by_one();
    body(Number{}, i);
  }
}

// The same, with single numbers first until out + i is aligned for streaming stores. A Pair's places are settled by the
// order of the floats it meets: there `out` must be aligned from the start.
template <class V, bool Stream, class T, class Body>
inline void for_lanes_writing(const T* out, int64_t count, Body&& body) {
  int64_t i = 0;
  if constexpr (Stream && !is_pair<V>)
    for (; i < count && reinterpret_cast<uintptr_t>(out + i) % (kWidth<V> * sizeof(T)) != 0; ++i) {
      one_by_one();
      body(typename Lane<V>::type{}, i);
    }
  for_lanes<V>(count, body, i);
}

// Where values of type V have number i of `count`: a Pair the numbers of even places of each run first.
template <class V>
inline int64_t lane_place(int64_t i, int64_t count) {
  const int64_t width = kWidth<V>, at = i % width;
  return !is_pair<V> || i - at + width > count ? i : i - at + at % 2 * (width / 2) + at / 2;
}

// The lower and the upper lanes of a vector, added.
template <class A, int Lanes, class V, size_t... I>
inline auto fold(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, I...) + __builtin_shufflevector(v, v, (I + Lanes / 2)...);
}

// Halves are added until `Left` lanes are left.
template <class A, int Left, int Lanes = kLanes<A>, class V>
inline auto fold_to(V v) {
  if constexpr (Lanes == Left)
    return v;
  else
    return fold_to<A, Left, Lanes / 2>(fold<A, Lanes>(v, std::make_index_sequence<Lanes / 2>{}));
}

// Sum of the lanes in a fixed order.
template <class A>
inline A lane_sum(Vec<A> v) {
  const auto two = fold_to<A, 2>(v);
  return two[0] + two[1];
}

// In every four lanes the sums of two neighbours, those of a and then those of b.
template <class V, size_t... I>
inline V pair_sums(V a, V b, std::index_sequence<I...>) {
  constexpr int lanes = sizeof...(I);
  constexpr auto from = [](int i, int half) { return (i % 4 < 2 ? 0 : lanes) + i / 4 * 4 + i % 2 * 2 + half; };
  return __builtin_shufflevector(a, b, from(I, 0)...) + __builtin_shufflevector(a, b, from(I, 1)...);
}

// The lane sums of four vectors at once, for vectors of four lanes or more.
template <class A>
inline auto lane_sums(const Vec<A> (&v)[4]) {
  constexpr std::make_index_sequence<kLanes<A>> all{};
  return fold_to<A, 4>(pair_sums(pair_sums(v[0], v[1], all), pair_sums(v[2], v[3], all), all));
}

// out[r] += the lane sum of v[r]
template <class A, int R>
inline void add_lane_sums(const Vec<A> (&v)[R], A* out) {
  if constexpr (R == 4 && kLanes<A> >= 4) {
    auto sums = lane_sums<A>(v);
    decltype(sums) before;
    __builtin_memcpy(&before, out, sizeof(before));
    sums += before;
    __builtin_memcpy(out, &sums, sizeof(sums));
  } else {
    for (int r = 0; r < R; ++r) out[r] += lane_sum<A>(v[r]);
  }
}

// Sum of a whole line, kept in eight lanes of double.
template <class A>
double sum_line(const A* line, int64_t count) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] += line[i + j];
  for (int j = 0; i < count; ++i, ++j) lanes[j] += line[i];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
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
    else if constexpr (is_pair<V>)
      lanes[which] += v.even + v.odd;
    else
      lanes[which] += v;
  }
  A value(int which) const { return lane_sum<A>(lanes[which]) + tail[which]; }
  void values(A (&out)[Count]) const {
    for (int i = 0; i < Count; ++i) out[i] = tail[i];
    add_lane_sums<A>(lanes, out);
  }
};

}  // namespace divnorm::DIVNORM_ISA
