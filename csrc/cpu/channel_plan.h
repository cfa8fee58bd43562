// How a channel normalization is cut: a tile is all channels of some positions, which a thread takes a few vectors at a
// time.
#pragma once

#include "../channels.h"
#include "partials.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kCopyBytes = 16 << 10;      // of a tile's copy, so that it stays in the nearest cache, where that
constexpr int64_t kMostCopyBytes = 64 << 10;  // leaves this many positions or more; a nearer cache than memory else
constexpr int64_t kFewestPositions = 32;
constexpr int64_t kMostPositions = 64;  // runs of memory that long come at full speed

struct ChannelTile {
  int64_t offset, count;  // of its first number in x; positions
};

template <class A>
struct ChannelPlan {
  bool side_by_side;  // the channels of a position in memory; else the positions of a channel
  int64_t channels, inner, run, positions, tiles_of_run, tiles;

  explicit ChannelPlan(const ChannelProblem& problem) {
    side_by_side = problem.inner == 1;
    channels = problem.channels;
    inner = problem.inner;
    run = side_by_side ? problem.outer : inner;
    const int64_t position = channels * static_cast<int64_t>(sizeof(A));
    const int64_t few = smaller(kMostCopyBytes / position, kFewestPositions);
    const int64_t most = smaller(larger(larger(kCopyBytes / position, few), kLanes<A>), kMostPositions);
    positions = divide_up(divide_up(run, divide_up(run, most)), kLanes<A>) * kLanes<A>;
    tiles_of_run = divide_up(run, positions);
    tiles = tiles_of_run * (side_by_side ? 1 : problem.outer);
  }

  ChannelTile tile(int64_t index) const {
    const int64_t first = index % tiles_of_run * positions, count = smaller(positions, run - first);
    if (side_by_side) return {first * channels, count};
    return {index / tiles_of_run * channels * inner + first, count};
  }

  int64_t numbers() const { return channels * positions; }  // of a tile
};

}  // namespace divnorm::DIVNORM_ISA
