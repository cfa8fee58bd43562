// How a call is cut for a device: which strategy, which tiles, how much shared memory and scratch. No CUDA here.
#pragma once

#include <functional>
#include <string>

#include "shape.h"

namespace divnorm::cuda {

struct Device {
  int multiprocessors = 1;
  int64_t cache_bytes = 0;     // of the second level
  int shared_bytes = 0;        // of a multiprocessor
  int block_shared_bytes = 0;  // the most a block can have
  bool clusters = false;
};

// A row of the table (backends/cuda/strategies.json), which says what each number means.
struct Preferences {
  int cluster = 1;
  int blocks = 1;
  int threads = 0, bytes_per_thread = 0;
  int slice_channels = 0, stretch_bytes = 0;
  int window_rounds = 0;
  int staged_threads = 0, tile_bytes = 0, tile_positions = 0;
  int row_positions = 0, items = 0;
  double cache_share = 0;
  int finish_inside = 0;
  int pipeline = 0;
};

// Offsets into the scratch memory of a call, -1: not there.
struct Scratch {
  int64_t counters = -1, maps = -1, merged = -1;
  int64_t dweight = -1, dbias = -1, dthreshold = -1, dsigma = -1, l1 = -1;
  int64_t slices = -1, slice_counters = -1;  // of the sums over the latter in a launch of their own
  int64_t flags = -1;                        // where the kernel makes them
  int64_t counter_count = 0, bytes = 0;
  int64_t affine_slots = 0, sigma_slots = 0, l1_slots = 0;  // of sigma: for each group
  int64_t row_parts = 0;                                    // of the sums over a row
};

enum class Method { staged, resident, pipelined };

struct Strategy {
  Arguments arguments;  // all but the tensors
  Scratch scratch;
  Method method = Method::staged;
  int64_t blocks = 0;
  int cluster = 1, threads = 0;
  int summing_blocks = 0;  // of the grid's last, that make the sums over partial sums; 0: a launch behind it does

  // "pipelined", "cluster-resident", "single-block" or "two-pass".
  std::string name() const {
    switch (method) {
      case Method::pipelined: return "pipelined";
      case Method::resident: return cluster > 1 ? "cluster-resident" : "single-block";
      default: return "two-pass";
    }
  }
};

// How many clusters of a strategy that holds rows on chip a device holds at once; 0: it cannot start one.
using ClustersAtOnce = std::function<int64_t(const Strategy&)>;

// `at_once` asks a device that is there; without it the device's properties alone decide.
Strategy choose(const Problem& problem, Direction direction, const Preferences& preferences, const Device& device,
                const ClustersAtOnce& at_once = {});

// Of whole fields, for a part of a direction by itself: two passes, of which these are the halves.
Strategy choose(const Problem& problem, Direction direction, Part part, const Preferences& preferences,
                const Device& device);

}  // namespace divnorm::cuda
