#include "sums.h"

#include <algorithm>

#include "shape.h"

namespace divnorm::cuda {
namespace {

constexpr int kWarps = kFinishThreads / kFinishColumns;

// Rows that a warp takes at once.
int64_t warp_rows(const Reduction& reduction) { return kFinishColumns / reduction.block_columns; }

}  // namespace

Reduction cut(Reduction reduction) {
  reduction.block_columns = 1 << log2_up(std::min<int64_t>(reduction.columns, kFinishColumns));
  reduction.sets = ceil_div(reduction.columns, reduction.block_columns);
  const int64_t of_slice = kWarps * warp_rows(reduction) * kLoadsOfSlice;
  reduction.slices = static_cast<int>(std::clamp<int64_t>(ceil_div(reduction.rows, of_slice), 1, kMostSlices));
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

}  // namespace divnorm::cuda
