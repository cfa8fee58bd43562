// Partial sums become the parameters' gradients and l1, in an order that depends on sizes alone.
#pragma once

#include "numbers.h"
#include "program.h"

namespace divnorm::cuda {

// A block sums kFinishColumns columns; its warps share the rows.
template <class A>
__global__ void __launch_bounds__(kFinishThreads) finish(const __grid_constant__ FinishArguments args) {
  static_assert(kFinishColumns == device::kWarp, "a lane takes a column");
  int64_t first = device::block() * kFinishColumns;
  int which = 0;
  const auto padded = [&](int i) {
    return (args.reduction[i].columns + kFinishColumns - 1) / kFinishColumns * kFinishColumns;
  };
  while (first >= padded(which)) first -= padded(which++);
  const Reduction& r = args.reduction[which];
  const int lane = device::thread() % device::kWarp, warp = device::thread() / device::kWarp;
  const int warps = device::threads() / device::kWarp;
  const int64_t column = first + lane;
  A sum = 0;
  if (column < r.columns) {
    const A* source = static_cast<const A*>(r.source) + column * r.column_step;
#pragma unroll 4
    for (int64_t row = warp; row < r.rows; row += warps) sum += device::load(source + row * r.row_step);
  }
  A* sums = reinterpret_cast<A*>(device::shared_memory());
  sums[device::thread()] = sum;
  device::sync_block();
  if (warp != 0 || column >= r.columns) return;
  for (int w = 1; w < warps; ++w) sum += sums[w * device::kWarp + lane];
  if (r.sigma.data != nullptr) sum *= read<A>(r.sigma, column);
  write<A>(r.result, column, sum * static_cast<A>(r.factor));
}

}  // namespace divnorm::cuda
