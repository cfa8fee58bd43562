// The kernels of one dtype, as the launcher knows them. Each kernels_*.cu instantiates one set.
#pragma once

#include "program.h"

namespace divnorm::cuda {

using Kernel = void (*)(const Arguments);
using FinishKernel = void (*)(const FinishArguments);
using ClearKernel = void (*)(const ClearArguments);

// Pairs: contiguous, channels_last.
struct KernelSet {
  Kernel resident_forward[2], resident_backward[2], staged_forward[2], staged_backward[2];
  FinishKernel finish;
  ClearKernel clear;
};

const KernelSet& kernels_float64();
const KernelSet& kernels_float32();
const KernelSet& kernels_bfloat16();
const KernelSet& kernels_float16();

}  // namespace divnorm::cuda
