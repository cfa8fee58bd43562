// A tile of all channels of some positions: between global memory, where it is in x's type, and a block's arrays.
#pragma once

#include <type_traits>

#include "channels_program.h"
#include "maps.h"

namespace divnorm::cuda {

// Numbers of a block: in its shared memory, or in scratch memory.
template <class A, bool Far>
struct ChannelArray {
  A* numbers;

  __device__ A get(int i) const {
    if constexpr (Far)
      return device::load(numbers + i);
    else
      return numbers[i];
  }
  __device__ void set(int i, A value) const {
    if constexpr (Far)
      device::store(numbers + i, value);
    else
      numbers[i] = value;
  }
};

struct ChannelTile {
  int64_t first = 0;  // offset of its first number in the tensor
  int64_t pitch = 0;  // between its rows there
  int rows = 0, row = 0;
  int positions = 0;
};

__device__ inline ChannelTile channel_tile(const ChannelArguments& args, int64_t index) {
  const ChannelCut& cut = args.cut;
  ChannelTile tile;
  if (cut.stretches > 0) {
    const int64_t outer = index / cut.stretches, from = (index - outer * cut.stretches) * cut.positions;
    const int64_t left = args.inner - from;
    tile.first = outer * args.channels * args.inner + from;
    tile.pitch = args.inner;
    tile.rows = args.channels;
    tile.row = tile.positions = static_cast<int>(left < cut.positions ? left : cut.positions);
  } else {
    const int64_t from = index * cut.outers, left = args.outer - from;
    tile.first = from * cut.row;
    tile.pitch = tile.row = cut.row;
    tile.rows = static_cast<int>(left < cut.outers ? left : cut.outers);
    tile.positions = tile.rows * static_cast<int>(args.inner);
  }
  return tile;
}

// Calls body(Count as a constant) with the most numbers at once that the addresses of the tile's rows allow.
template <class T, class Body>
__device__ void with_pack(const ChannelTile& tile, const ChannelCut& cut, const T* tensor, Body&& body) {
  const uint64_t together = reinterpret_cast<uint64_t>(tensor + tile.first) |
                            static_cast<uint64_t>(tile.row | cut.row) * sizeof(T) |
                            (tile.rows > 1 ? static_cast<uint64_t>(tile.pitch) * sizeof(T) : 0);
  if (together % kVectorBytes == 0)
    body(std::integral_constant<int, kVectorBytes / sizeof(T)>());
  else if (together % (kVectorBytes / 2) == 0)
    body(std::integral_constant<int, kVectorBytes / 2 / sizeof(T)>());
  else
    body(std::integral_constant<int, 1>());
}

// Number i of the result is number i + by of the pack, around its end; by < Count.
template <class A, int Count>
__device__ Pack<A, Count> turned(Pack<A, Count> pack, int by) {
#pragma unroll
  for (int step = 1; step < Count; step *= 2) {
    const Pack<A, Count> before = pack;
#pragma unroll
    for (int i = 0; i < Count; ++i) pack.at[i] = by & step ? before.at[(i + step) % Count] : before.at[i];
  }
  return pack;
}

// By how much a lane turns its pack, which begins at number `at` of an array: packs of neighbouring lanes lie side by
// side, and so all banks of shared memory are at work.
template <class A, int Count>
__device__ int turn_of(int at) {
  constexpr int kLanes = device::kWarp * kWordBytes / (Count * static_cast<int>(sizeof(A)));  // with all banks
  return (device::thread() % device::kWarp / kLanes - at) & (Count - 1);
}

// This thread's packs of a tile, kPacksTogether of them at once: body(i, where it is in the tensor, where in an array)
// for the i-th.
constexpr int kPacksTogether = 4;

template <int Count>
class ChannelPacks {
 public:
  __device__ ChannelPacks(const ChannelTile& tile, const ChannelCut& cut)
      : tile_(tile), cut_(cut), end_(tile.rows * cut.row), next_(device::thread() * Count) {}
  __device__ bool more() const { return next_ < end_; }
  __device__ void next() { next_ += kPacksTogether * device::threads() * Count; }
  template <class Body>
  __device__ void each(Body&& body) const {
#pragma unroll
    for (int i = 0; i < kPacksTogether; ++i) {
      const int number = next_ + i * device::threads() * Count;
      if (number >= end_) break;
      const int row = quotient(cut_.by_row, number), column = number - row * cut_.row;
      if (column < tile_.row) body(i, tile_.first + row * tile_.pitch + column, row * cut_.pitch + column);
    }
  }

 private:
  const ChannelTile& tile_;
  const ChannelCut& cut_;
  int end_, next_;
};

template <class T, class Array>
__device__ void copy_in(const ChannelTile& tile, const ChannelCut& cut, const void* tensor, const Array& to) {
  const T* global = static_cast<const T*>(tensor);
  with_pack(tile, cut, global, [&](auto constant) {
    constexpr int Count = decltype(constant)::value;
    using Run = Pack<T, Count>;
    for (ChannelPacks<Count> packs(tile, cut); packs.more(); packs.next()) {
      Run run[kPacksTogether];
      packs.each([&](int i, int64_t from, int) { run[i] = device::load(reinterpret_cast<const Run*>(global + from)); });
      packs.each([&](int i, int64_t, int at) {
        const int turn = turn_of<Acc<T>, Count>(at);
        const Pack<Acc<T>, Count> wide = turned(widen(run[i]), turn);
#pragma unroll
        for (int n = 0; n < Count; ++n) to.set(at + (n + turn) % Count, wide.at[n]);
      });
    }
  });
}

template <class T, class Array>
__device__ void copy_out(const ChannelTile& tile, const ChannelCut& cut, const Array& from, void* tensor) {
  T* global = static_cast<T*>(tensor);
  with_pack(tile, cut, global, [&](auto constant) {
    constexpr int Count = decltype(constant)::value;
    using Run = Pack<T, Count>;
    for (ChannelPacks<Count> packs(tile, cut); packs.more(); packs.next()) {
      Run run[kPacksTogether];
      packs.each([&](int i, int64_t, int at) {
        const int turn = turn_of<Acc<T>, Count>(at);
        Pack<Acc<T>, Count> wide;
#pragma unroll
        for (int n = 0; n < Count; ++n) wide.at[n] = from.get(at + (n + turn) % Count);
        run[i] = narrow<T, Count>(turned(wide, (Count - turn) % Count));
      });
      packs.each([&](int i, int64_t to, int) { device::store_at_once(reinterpret_cast<Run*>(global + to), run[i]); });
    }
  });
}

}  // namespace divnorm::cuda
