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
  for (; i < count; ++i) body(Number{}, i);
}

// The same, with single numbers first until out + i is aligned for streaming stores. A Pair's places are settled by the
// order of the floats it meets: there `out` must be aligned from the start.
template <class V, bool Stream, class T, class Body>
inline void for_lanes_writing(const T* out, int64_t count, Body&& body) {
  int64_t i = 0;
  if constexpr (Stream && !is_pair<V>)
    for (; i < count && reinterpret_cast<uintptr_t>(out + i) % (kWidth<V> * sizeof(T)) != 0; ++i)
      body(typename Lane<V>::type{}, i);
  for_lanes<V>(count, body, i);
}

// Count numbers in the order in which values of type V take them: a Pair those of even places of each run first.
// Other values take them as they lie.
template <class V, class A>
class InLaneOrder {
 public:
  InLaneOrder(const A* numbers, int64_t) : numbers_(numbers) {}
  const A* data() const { return numbers_; }

 private:
  const A* numbers_;
};

// Where number i of `count` stands in that order.
template <class V>
inline int64_t lane_place(int64_t i, int64_t count) {
  const int64_t width = kWidth<V>, at = i % width;
  return !is_pair<V> || i - at + width > count ? i : i - at + at % 2 * (width / 2) + at / 2;
}

template <size_t... I>
inline Pair split(Vec<float> low, Vec<float> high, std::index_sequence<I...>) {
  return {__builtin_shufflevector(low, high, 2 * I...), __builtin_shufflevector(low, high, (2 * I + 1)...)};
}

template <>
class InLaneOrder<Pair, float> {
 public:
  InLaneOrder(const float* numbers, int64_t count) {
    for_lanes<Pair>(count, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      if constexpr (is_pair<V>) {
        const Pair run = load<V>(numbers + i);
        store(numbers_ + i, split(run.even, run.odd, std::make_index_sequence<kLanes<float>>{}));
      } else {
        store(numbers_ + i, load<V>(numbers + i));
      }
    });
  }
  const float* data() const { return numbers_; }

 private:
  alignas(kVectorBytes) float numbers_[kTilePositions];
};

template <size_t... I>
inline Pair join(const Pair& v, std::index_sequence<I...>) {
  constexpr int lanes = sizeof...(I);
  return {__builtin_shufflevector(v.even, v.odd, (I / 2 + I % 2 * lanes)...),
          __builtin_shufflevector(v.even, v.odd, (lanes / 2 + I / 2 + I % 2 * lanes)...)};
}

// Puts numbers in the lane order of V back into their own, in place.
template <class V, class A>
inline void restore_order(A* numbers, int64_t count) {
  if constexpr (is_pair<V>)
    for (int64_t i = 0; i + kWidth<V> <= count; i += kWidth<V>)
      store(numbers + i, join(load<V>(numbers + i), std::make_index_sequence<kLanes<float>>{}));
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
    const auto folded = fold_to<A, 4>(four);
    __builtin_memcpy(sums, &folded, sizeof(sums));
  } else {
    for (int i = 0; i < 4; ++i) sums[i] = lane_sum<A>(v[i]);
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
    if constexpr (Count == 4) {
      lane_sums<A>(lanes, out);
      for (int i = 0; i < Count; ++i) out[i] += tail[i];
    } else {
      for (int i = 0; i < Count; ++i) out[i] = value(i);
    }
  }
};

}  // namespace divnorm::DIVNORM_ISA
