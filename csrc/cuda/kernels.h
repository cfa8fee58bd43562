// The kernels of one dtype, as the launcher knows them. Each kernels_*.cu instantiates one set.
#pragma once

#include "program.h"

namespace divnorm::cuda {

using Kernel = void (*)(const Arguments);
using FinishKernel = void (*)(const FinishArguments);
using ClearKernel = void (*)(const ClearArguments);

// Of a direction and strategy: by form, contiguous and channels_last.
using Kernels = Kernel[2][2];

struct KernelSet {
  Kernels pipelined_forward, pipelined_backward, resident_forward, resident_backward, staged_forward, staged_backward;
  Kernel seam_sums[2];  // contiguous and channels_last
  FinishKernel finish;
  ClearKernel clear;
};

const KernelSet& kernels_float64();
const KernelSet& kernels_float32();
const KernelSet& kernels_bfloat16();
const KernelSet& kernels_float16();

}  // namespace divnorm::cuda
