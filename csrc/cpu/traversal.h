// The order of the work. A unit is walked along its outermost axis in slabs of rows: reduce the channels of the slab's
// rows (and of those the windows look ahead to), filter the small maps, then finish the slab while it is still in
// cache. Rows, tiles and blocks depend on the sizes alone, never on the number of threads, so neither do the results.
#pragma once

#include "threads.h"
#include "unit.h"

namespace divnorm::DIVNORM_ISA {

// What a slab and the rows ahead of it may take of x (and dy) and of scratch: a second read should find a cache.
constexpr int64_t kSlabBytes = 4 << 20;
constexpr int64_t kSmallestTile = 256;
constexpr int64_t kTileStep = 16;        // whole vectors of any instruction set
constexpr int64_t kWantedTiles = 16;     // smaller tiles below this many, to have work for every thread
constexpr int64_t kFeatureSamples = 64;  // samples that share one partial sum per feature in the (N, F) form

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Reach {
  int64_t lo = 0, hi = 0;
};

struct Step {
  int64_t reduce_begin, reduce_end;  // rows whose channels are reduced in this step
  int64_t first_begin, first_end;    // rows filtered by the first field
  int64_t second_begin, second_end;  // rows filtered by the second field and finished
};

struct Traversal {
  int64_t rows = 0, line = 0;  // the outermost axis, and positions per row of it
  Reach first, second;
  int64_t slab_rows = 0, capacity_rows = 0, steps = 0;
  int64_t tile = 0;
  int64_t reduce_tiles = 0, finish_tiles = 0;  // in a whole unit
  int64_t block_samples = 1, blocks = 0;       // a job is one block of samples of one segment
  int64_t segments = 1, unit_groups = 1, unit_samples = 1;
  bool tiles_share_partials = false;

  int64_t jobs() const { return blocks * segments; }
  int64_t partial_rows() const { return blocks * (tiles_share_partials ? 1 : reduce_tiles); }
  int64_t partial_row(int64_t block, int64_t tile_index) const {
    return tiles_share_partials ? block : block * reduce_tiles + tile_index;
  }
  int64_t scratch_row_numbers() const { return unit_groups * capacity_rows * line; }

  Step step(int64_t index) const {
    Step s{0, 0, 0, 0, 0, 0};
    if (index > 0) ends(index - 1, s.reduce_begin, s.first_begin, s.second_begin);
    ends(index, s.reduce_end, s.first_end, s.second_end);
    return s;
  }

  // The first row that a step or a later one still needs.
  int64_t keep_from(const Step& s) const {
    return larger(0, smaller(s.first_begin - first.lo, s.second_begin - second.lo));
  }

 private:
  void ends(int64_t index, int64_t& reduce, int64_t& first_rows, int64_t& second_rows) const {
    second_rows = smaller((index + 1) * slab_rows, rows);
    first_rows = smaller(second_rows + second.hi, rows);
    reduce = smaller(first_rows + first.hi, rows);
  }
};

inline Traversal plan_traversal(const Problem& problem, Reach first, Reach second, int64_t bytes_per_position,
                                bool all_groups_in_unit) {
  Traversal t;
  t.rows = problem.extent[0];
  t.line = problem.extent[1] * problem.extent[2];
  t.first = first;
  t.second = second;
  t.segments = all_groups_in_unit ? 1 : problem.groups;
  t.unit_groups = all_groups_in_unit ? problem.groups : 1;
  t.unit_samples = problem.over_batch ? problem.batch : 1;

  const int64_t ahead = first.lo + first.hi + second.lo + second.hi;
  const int64_t row_bytes = larger(1, t.line * bytes_per_position * t.unit_samples);
  t.slab_rows = larger(kSlabBytes / row_bytes - ahead, larger(divide_up(kTilePositions, larger(1, t.line)), ahead));
  t.slab_rows = smaller(larger(t.slab_rows, 1), larger(t.rows, 1));
  t.capacity_rows = smaller(t.slab_rows + ahead, t.rows);
  t.steps = divide_up(t.rows, t.slab_rows);

  const int64_t positions = t.rows * t.line;
  const int64_t units = problem.over_batch ? t.segments : problem.batch * t.segments;
  const int64_t most = smaller(larger(divide_up(units * positions, kWantedTiles), kSmallestTile), kTilePositions);
  const int64_t slab = larger(1, t.slab_rows * t.line);
  const int64_t tiles = slab <= most ? 1 : divide_up(slab, 2 * most) * 2;  // an even number, to share
  t.tile = smaller(divide_up(divide_up(slab, tiles), kTileStep) * kTileStep, kTilePositions);
  for (int64_t i = 0; i < t.steps; ++i) {
    const Step s = t.step(i);
    t.reduce_tiles += divide_up((s.reduce_end - s.reduce_begin) * t.line, t.tile);
    t.finish_tiles += divide_up((s.second_end - s.second_begin) * t.line, t.tile);
  }

  // Units too small for a tile share a partial sum with their neighbours.
  t.block_samples = 1;
  if (problem.over_batch)
    t.block_samples = problem.batch;
  else if (problem.affine_per_position)
    t.block_samples = larger(kFeatureSamples, divide_up(kSmallestTile, larger(1, positions)));
  else if (positions < kSmallestTile)
    t.block_samples = divide_up(kSmallestTile, larger(1, positions));
  t.blocks = divide_up(problem.batch, larger(1, t.block_samples));
  t.tiles_share_partials = problem.affine_per_position || (!problem.over_batch && t.block_samples > 1);
  return t;
}

template <class Pass>
void walk_unit(const Traversal& t, Member member, Pass& pass);
template <class Body>
int64_t each_tile(const Traversal& t, Member member, int64_t begin, int64_t end, Body&& body);

// Walks every job of the traversal with a team of threads each. `make(team_index, thread_index)` gives a thread its
// pass, an object with start(unit, block, fresh), slide(keep_row), reduce(tile, index), first(begin, end), where
// looks_again() a second look at the tensors of the same rows by again(tile), second(begin, end) and finish(tile,
// index).
template <class Make>
void walk(const Problem& problem, const Traversal& t, Threads& threads, Make&& make) {
  threads.run([&](Member member) {
    auto pass = make(member.team, member.thread);
    const int64_t begin = member.team * t.jobs() / member.teams, end = (member.team + 1) * t.jobs() / member.teams;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t block = job / t.segments, segment = job % t.segments;
      const int64_t first_sample = block * t.block_samples;
      const int64_t last_sample = smaller(first_sample + t.block_samples, problem.batch);
      for (int64_t sample = first_sample; sample < last_sample; sample += t.unit_samples) {
        pass.start(Unit{sample, t.unit_samples, segment, t.unit_groups}, block, sample == first_sample);
        walk_unit(t, member, pass);
      }
    }
  });
}

template <class Pass>
void walk_unit(const Traversal& t, Member member, Pass& pass) {
  int64_t reduce_index = 0, finish_index = 0;
  for (int64_t i = 0; i < t.steps; ++i) {
    const Step s = t.step(i);
    // Every member moves its own view; the first also moves the rows.
    member.sync();
    pass.slide(t.keep_from(s), s.reduce_begin, member.rank == 0);
    member.sync();
    reduce_index += each_tile(t, member, s.reduce_begin, s.reduce_end,
                              [&](Tile tile, int64_t index) { pass.reduce(tile, reduce_index + index); });
    member.sync();
    member.share(s.first_begin, s.first_end, [&](int64_t begin, int64_t end) { pass.first(begin, end); });
    member.sync();
    if (pass.looks_again()) {
      each_tile(t, member, s.first_begin, s.first_end, [&](Tile tile, int64_t) { pass.again(tile); });
      member.sync();
    }
    member.share(s.second_begin, s.second_end, [&](int64_t begin, int64_t end) { pass.second(begin, end); });
    member.sync();
    finish_index += each_tile(t, member, s.second_begin, s.second_end,
                              [&](Tile tile, int64_t index) { pass.finish(tile, finish_index + index); });
  }
}

// The member's share of the tiles of rows begin..end; returns how many tiles there are for the team.
template <class Body>
int64_t each_tile(const Traversal& t, Member member, int64_t begin, int64_t end, Body&& body) {
  const int64_t first = begin * t.line, last = end * t.line;
  const int64_t tiles = divide_up(last - first, t.tile);
  member.share(0, tiles, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) body(Tile{first + i * t.tile, smaller(first + (i + 1) * t.tile, last)}, i);
  });
  return tiles;
}

}  // namespace divnorm::DIVNORM_ISA
