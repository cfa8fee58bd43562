// The pieces a call is cut into. A unit is the set of samples and groups whose statistics are computed together;
// a tile is a range of its flattened positions.
#pragma once

#include "../problem.h"
#include "simd.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kTilePositions = 1024;  // at most; the tile-local rows of a kernel then stay in the first-level cache

struct Unit {
  int64_t sample = 0, samples = 1;
  int64_t group = 0, groups = 1;
};

struct Tile {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};

// A map of one value per group of the unit and position. `base` points at group 0, position `first`; a map whose field
// is absent points at a row of its neutral value, which serves every position.
template <class A>
struct Map {
  A* base = nullptr;
  int64_t group_stride = 0;
  int64_t first = 0;
  bool neutral = false;

  A* at(int64_t group, int64_t position) const {
    return neutral ? base : base + group * group_stride + (position - first);
  }
  operator Map<const A>() const { return {base, group_stride, first, neutral}; }
};

}  // namespace divnorm::DIVNORM_ISA
