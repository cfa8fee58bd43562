// Zeros for what a launch counts with.
#pragma once

#include "device.h"
#include "program.h"

namespace divnorm::cuda {

// A set for each dtype has its own, for the linker's sake.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) clear(const __grid_constant__ ClearArguments args) {
  device::let_next_begin();
  const int64_t i = device::block() * device::threads() + device::thread();
  if (i < args.count) device::store(args.numbers + i, 0);
}

}  // namespace divnorm::cuda
