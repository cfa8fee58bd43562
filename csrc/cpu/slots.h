// The row of a tile as vectors take it, slot by slot. Where the last slot is not filled it lies over the row's end and
// takes numbers of the one before once more: single numbers would cost as much as vectors.
// Copies of rows hold slot after slot, those of a Pair in its order (see simd.h).
#pragma once

#include "lanes.h"

namespace divnorm::DIVNORM_ISA {

// Calls body(V{}) with the widest type, from Wide down to single numbers, that `count` numbers fill. Streaming: rows
// that are long, which Wide serves.
template <class Wide, bool Stream = false, class Body>
inline auto with_widest(int64_t count, Body&& body) {
  using A = typename Lane<Wide>::type;
  if (Stream || count >= kWidth<Wide>) return body(Wide{});
  if constexpr (!Stream && is_pair<Wide>)
    if (count >= kLanes<A>) return body(Vec<A>{});
  if constexpr (!Stream) return body(A{});
}

template <class V>
inline int64_t slot_count(int64_t count) {
  return (count + kWidth<V> - 1) / kWidth<V>;
}

// The place in the row of what has place `at` in copies.
template <class V>
inline int64_t slot_from(int64_t at, int64_t count) {
  return at < count - kWidth<V> ? at : count - kWidth<V>;
}

// How many of a slot's first numbers are those of the slot before: none, but for the last slot.
using NoneAgain = std::integral_constant<int64_t, 0>;

// Slots taken at once: where a vector is half a line of the cache, both halves, for rows that lie a power of two apart
// drive each other's lines out.
template <class V>
constexpr int kAtOnce = is_scalar<V> || is_pair<V> || kVectorBytes == 64 ? 1 : 2;

template <class V, int Slots, class A>
inline void load_slots(const A* copy, V (&values)[Slots]) {
  for (int s = 0; s < Slots; ++s) values[s] = load<V>(copy + s * kWidth<V>);
}

// body(slots at once, place in copies, place in the row, how many again) for every slot of `count` numbers; these fill
// one V or more.
template <class V, class Body>
inline void for_slots(int64_t count, Body&& body) {
  constexpr int64_t step = kAtOnce<V> * kWidth<V>;
  int64_t at = 0;
  for (; at + step <= count; at += step) {
    if constexpr (is_scalar<V>) one_by_one();
    body(std::integral_constant<int, kAtOnce<V>>{}, at, at, NoneAgain{});
  }
  if constexpr (!is_scalar<V>)
    for (; at < count; at += kWidth<V>) {
      const int64_t from = slot_from<V>(at, count);
      body(std::integral_constant<int, 1>{}, at, from, at - from);
    }
}

// The same one by one: body(place in copies, place in the row, how many again)
template <class V, class Body>
inline void for_each_slot(int64_t count, Body&& body) {
  int64_t at = 0;
  for (; at + kWidth<V> <= count; at += kWidth<V>) {
    if constexpr (is_scalar<V>) one_by_one();
    body(at, at, NoneAgain{});
  }
  if constexpr (!is_scalar<V>)
    if (at < count) body(at, count - kWidth<V>, at + kWidth<V> - count);
}

// for_slots() for a row that is written to `out`: body(V{}, ...). Streaming stores write nothing twice: what they reach
// goes as for_lanes_writing has it, and its places are the row's own.
template <class V, bool Stream, class T, class Body>
inline void for_slots_writing(const T* out, int64_t count, Body&& body) {
  if constexpr (Stream)
    for_lanes_writing<V, true>(
        out, count, [&](auto lane, int64_t i) { body(lane, std::integral_constant<int, 1>{}, i, i, NoneAgain{}); });
  else
    for_slots<V>(count, [&](auto slots, int64_t at, int64_t from, auto again) { body(V{}, slots, at, from, again); });
}

template <int Most, class Body>
inline void with_number(int64_t number, Body&& body) {
  if constexpr (Most > 1)
    if (number < Most) return with_number<Most - 1>(number, body);
  body(std::integral_constant<int, Most>{});
}

// body(number of slots, the first) for groups of at most Most slots, of about the same size.
template <int Most, class Body>
inline void for_slot_groups(int64_t slots, Body&& body) {
  const int64_t groups = (slots + Most - 1) / Most, fewer = slots / groups, larger_ones = slots % groups;
  for (int64_t i = 0, first = 0; i < groups; ++i) {
    const int64_t number = fewer + (i < larger_ones ? 1 : 0);
    with_number<Most>(number, [&](auto constant) { body(constant, first); });
    first += number;
  }
}

// v where its place, First + Step * lane, is `begin` or later, and zero elsewhere.
template <int First, int Step, class V, size_t... I>
inline V lanes_from(int64_t begin, V v, std::index_sequence<I...>) {
  using A = typename Lane<V>::type;
  const V place = {static_cast<A>(First + Step * static_cast<int>(I))...};
  return place >= splat<V>(begin) ? v : V{};
}

// v, but zero in the lanes whose numbers the slot before had.
template <class V>
inline V only_new(V v, NoneAgain) {
  return v;
}
template <class V>
inline V only_new(V v, int64_t again) {
  constexpr std::make_index_sequence<kLanes<typename Lane<V>::type>> all{};
  if constexpr (is_pair<V>)
    return {lanes_from<0, 2>(again, v.even, all), lanes_from<1, 2>(again, v.odd, all)};
  else
    return lanes_from<0, 1>(again, v, all);
}

template <size_t... I>
inline Pair split(const Pair& v, std::index_sequence<I...>) {
  return {__builtin_shufflevector(v.even, v.odd, 2 * I...), __builtin_shufflevector(v.even, v.odd, (2 * I + 1)...)};
}

template <size_t... I>
inline Pair join(const Pair& v, std::index_sequence<I...>) {
  constexpr int lanes = sizeof...(I);
  return {__builtin_shufflevector(v.even, v.odd, (I / 2 + I % 2 * lanes)...),
          __builtin_shufflevector(v.even, v.odd, (lanes / 2 + I / 2 + I % 2 * lanes)...)};
}

// Numbers of a copy: a line more than it needs, so that copies side by side do not fall on the same lines of the cache.
template <class A>
constexpr int64_t kCopyNumbers = kTilePositions + 64 / sizeof(A);

// A row's numbers slot by slot, for reading; the row itself where that is how it lies.
template <class V, bool Stream, class A>
class InSlots {
 public:
  InSlots(const A* row, int64_t count) : data_(row) {
    if (!is_pair<V> && (Stream || count % kWidth<V> == 0)) return;
    data_ = copy_;
    for_each_slot<V>(count, [&](int64_t at, int64_t from, auto) {
      const V v = load<V>(row + from);
      if constexpr (is_pair<V>)
        store(copy_ + at, split(v, std::make_index_sequence<kLanes<A>>{}));
      else
        store(copy_ + at, v);
    });
  }
  const A* data() const { return data_; }

 private:
  const A* data_;
  alignas(kVectorBytes) A copy_[kCopyNumbers<A>];
};

// The same where it is of use, else nothing.
template <bool Used, class V, bool Stream, class A>
class InSlotsIf : public InSlots<V, Stream, A> {
  using InSlots<V, Stream, A>::InSlots;
};
template <class V, bool Stream, class A>
class InSlotsIf<false, V, Stream, A> {
 public:
  InSlotsIf(const A*, int64_t) {}
  const A* data() const { return nullptr; }
};

// Writes a copy back to the row.
template <class V, class A>
inline void put_slots(const A* copy, int64_t count, A* row) {
  for_each_slot<V>(count, [&](int64_t at, int64_t from, auto) {
    const V v = load<V>(copy + at);
    if constexpr (is_pair<V>)
      store(row + from, join(v, std::make_index_sequence<kLanes<A>>{}));
    else
      store(row + from, v);
  });
}

// What a sum over all numbers of a row is kept in: a Pair's halves need no sums of their own.
template <class V>
using RowSum = std::conditional_t<is_pair<V>, Vec<float>, V>;

template <class V>
inline void add_to(RowSum<V>& sum, V v) {
  if constexpr (is_pair<V>) {
    sum += v.even;
    sum += v.odd;
  } else {
    sum += v;
  }
}

template <class V>
inline void subtract_product(RowSum<V>& sum, V a, V b) {
  if constexpr (is_pair<V>) {
    sum -= a.even * b.even;
    sum -= a.odd * b.odd;
  } else {
    sum -= a * b;
  }
}

// out[r] += all of sums[r]
template <class A, class Sum, int R>
inline void add_row_sums(const Sum (&sums)[R], A* out) {
  if constexpr (is_scalar<Sum>)
    for (int r = 0; r < R; ++r) out[r] += sums[r];
  else
    add_lane_sums<A>(sums, out);
}

}  // namespace divnorm::DIVNORM_ISA
