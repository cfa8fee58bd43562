// The partial sums that blocks leave in scratch memory, and how the sums over them are cut into blocks. No CUDA here.
#pragma once

#include <vector>

#include "layout.h"
#include "strategy.h"

namespace divnorm::cuda {

// Rows, columns and steps of the sums over what a strategy keeps in scratch memory: for `size` weights, biases or
// thresholds; for as many sigmas, one or one for each group; for l1; for `numbers` sums over rows.
Reduction affine_sums(const Scratch& scratch, int64_t size);
Reduction sigma_sums(const Scratch& scratch, int64_t groups, int64_t sigmas);
Reduction l1_sums(const Scratch& scratch);
Reduction row_sums(const Scratch& scratch, int64_t numbers);

// Cuts a reduction whose rows and columns are known, for a launch behind the kernel that leaves the partial sums.
Reduction cut(Reduction reduction);

// The same for the last blocks of that kernel itself, of which one sums a set. number_bytes: of a partial sum.
Reduction cut_inside(Reduction reduction, int64_t number_bytes);

// What cut reductions of one launch need: blocks, and counters where a set has several of them.
struct SumsRoom {
  void add(const Reduction& reduction);
  int64_t counters() const { return several ? sets : 0; }

  int64_t sets = 0, blocks = 0;
  int threads = 0;
  bool several = false;
};

// All partial sums that a call of a direction can want, where their slots are known.
class PartialSums {
 public:
  PartialSums(const Shape& shape, Direction direction, int64_t number_bytes)
      : shape_(shape), backward_(direction == Direction::backward), bytes_(number_bytes) {}

  // How many of a strategy's last blocks make the sums over them inside the kernel: as many as are wanted; none where
  // these had too much to do, or where the device holds fewer clusters at once, `clusters`, than there are.
  int summing_blocks(int wanted, const Strategy& strategy, int64_t clusters) const;

  // Finds them, and what the sums over them need, a place behind what is in the plan.
  void add_to(ScratchPlan& plan, Strategy& strategy) const;

 private:
  int64_t affine_size() const { return shape_.per_position ? shape_.positions : shape_.channels; }
  std::vector<Reduction> reductions(const Scratch& scratch) const;

  Shape shape_;
  bool backward_;
  int64_t bytes_;
};

}  // namespace divnorm::cuda
