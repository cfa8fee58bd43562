#include "sums.h"

#include <algorithm>

#include "shape.h"

namespace divnorm::cuda {
namespace {

constexpr int kWarps = kFinishThreads / kFinishColumns;

// Rows that a warp takes at once.
int64_t warp_rows(const Reduction& reduction) { return kFinishColumns / reduction.block_columns; }

Reduction sums(int64_t rows, int64_t columns, int64_t row_step, int64_t column_step) {
  Reduction reduction;
  reduction.rows = rows;
  reduction.columns = columns;
  reduction.row_step = row_step;
  reduction.column_step = column_step;
  return reduction;
}

}  // namespace

Reduction affine_sums(const Scratch& scratch, int64_t size) { return sums(scratch.affine_slots, size, size, 1); }
Reduction sigma_sums(const Scratch& scratch, int64_t groups, int64_t sigmas) {
  return sums(scratch.sigma_slots * (groups / sigmas), sigmas, 1, scratch.sigma_slots);
}
Reduction l1_sums(const Scratch& scratch) { return sums(scratch.l1_slots, 1, 1, 0); }
Reduction row_sums(const Scratch& scratch, int64_t numbers) { return sums(scratch.row_parts, numbers, numbers, 1); }

Reduction cut(Reduction reduction) {
  reduction.block_columns = 1 << log2_up(std::min<int64_t>(reduction.columns, kFinishColumns));
  reduction.sets = ceil_div(reduction.columns, reduction.block_columns);
  const int64_t of_slice = kWarps * warp_rows(reduction) * kLoadsOfSlice;
  reduction.slices = static_cast<int>(std::clamp<int64_t>(ceil_div(reduction.rows, of_slice), 1, kMostSlices));
  return reduction;
}

Reduction cut_inside(Reduction reduction, int64_t number_bytes) {
  const int64_t wide = kVectorBytes / number_bytes;
  if (reduction.column_step == 1 && reduction.columns % wide == 0 && reduction.row_step % wide == 0)
    reduction.numbers = static_cast<int>(wide);
  const int64_t columns = reduction.columns / reduction.numbers;
  reduction.block_columns = 1 << log2_up(std::min<int64_t>(columns, kFinishColumns));
  reduction.sets = ceil_div(columns, reduction.block_columns);
  return reduction;
}

void SumsRoom::add(const Reduction& reduction) {
  const int64_t rows = std::max<int64_t>(ceil_div(reduction.rows, reduction.slices), reduction.slices);
  const int64_t warps = std::clamp<int64_t>(ceil_div(rows, warp_rows(reduction)), 1, kWarps);
  sets += reduction.sets;
  blocks += reduction.sets * reduction.slices;
  threads = std::max(threads, static_cast<int>(warps) * kFinishColumns);
  several = several || reduction.slices > 1;
}

std::vector<Reduction> PartialSums::reductions(const Scratch& scratch) const {
  if (!backward_) return {l1_sums(scratch)};
  std::vector<Reduction> all(learns_thresholds(shape_) ? 3 : 2, affine_sums(scratch, affine_size()));
  all.push_back(sigma_sums(scratch, shape_.groups, shape_.groups));
  all.push_back(sigma_sums(scratch, shape_.groups, 1));
  const int64_t rows = (shape_.over_batch ? 1 : shape_.batch) * shape_.groups;
  if (scratch.row_parts > 0) all.push_back(row_sums(scratch, kTotals * rows));
  return all;
}

int PartialSums::summing_blocks(int wanted, const Strategy& strategy, int64_t clusters) const {
  const int64_t blocks = std::min<int64_t>(wanted, strategy.blocks);
  if (blocks < 1 || strategy.blocks > clusters * strategy.cluster) return 0;
  int64_t of_all = 0;
  for (const Reduction& one : reductions(strategy.scratch)) {
    const Reduction reduction = cut_inside(one, bytes_);
    const int64_t rows = strategy.threads / kFinishColumns * warp_rows(reduction) * kLoadsTogether;
    of_all += reduction.sets * ceil_div(reduction.rows, rows);
  }
  const int64_t flags = ceil_div(strategy.blocks, strategy.threads);
  return ceil_div(of_all, blocks) + flags <= kMostRoundsInside ? static_cast<int>(blocks) : 0;
}

void PartialSums::add_to(ScratchPlan& plan, Strategy& strategy) const {
  Scratch& scratch = strategy.scratch;
  if (backward_) {
    scratch.dweight = plan.add(scratch.affine_slots * affine_size() * bytes_);
    scratch.dbias = plan.add(scratch.affine_slots * affine_size() * bytes_);
    if (learns_thresholds(shape_)) scratch.dthreshold = plan.add(scratch.affine_slots * affine_size() * bytes_);
    scratch.dsigma = plan.add(scratch.sigma_slots * shape_.groups * bytes_);
  } else {
    scratch.l1 = plan.add(scratch.l1_slots * bytes_);
  }
  if (strategy.summing_blocks > 0) {
    scratch.flags = plan.add(strategy.summing_blocks * strategy.blocks * static_cast<int64_t>(sizeof(uint64_t)));
    return;
  }
  SumsRoom room;
  for (const Reduction& reduction : reductions(scratch)) room.add(cut(reduction));
  scratch.slices = plan.add(room.blocks * kFinishColumns * bytes_);
  scratch.slice_counters = plan.add(room.sets * static_cast<int64_t>(sizeof(int)));
}

}  // namespace divnorm::cuda
