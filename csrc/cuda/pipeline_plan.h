// How a call is cut for the pipelined kernels: blocks of a cluster, chunks, slots and what lies where. No CUDA here.
#pragma once

#include <optional>
#include <vector>

#include "strategy.h"

namespace divnorm::cuda {

class PipelinePlan {
 public:
  PipelinePlan(const Shape& shape, bool backward, int element, int sum, const Preferences& preferences);

  // Clusters of at most `blocks` blocks, without their share of the samples, split by positions as far as that leaves
  // stretches; those whose blocks keep within the limit of shared memory, and whose chunks bulk copies can move: whole
  // sixteen bytes at multiples of sixteen. twice: dy comes once with the statistics and once with the results, so that
  // x alone has to be held.
  std::vector<Strategy> strategies(int blocks, int limit, bool twice) const;

 private:
  std::optional<Strategy> strategy(int blocks, int64_t by_channels, int limit, bool twice) const;
  bool split(Resident& r, int blocks, int64_t by_channels, int64_t unit) const;
  bool cut(Strategy& chosen, int64_t unit, bool twice) const;
  bool share_planes(Resident& r, Pipeline& p) const;
  void box(Strategy& chosen) const;
  Boxes boxes(int64_t row, int64_t rows, int64_t chunk) const;
  void surround(Strategy& chosen) const;
  bool lay_out(Strategy& chosen, int limit) const;

  Shape shape_;
  bool backward_;
  int element_, sum_;
  Preferences p_;
};

}  // namespace divnorm::cuda
