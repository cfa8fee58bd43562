// What an instruction set computes.
#pragma once

#include "../channels.h"
#include "../gdn.h"
#include "simd.h"

namespace divnorm::DIVNORM_ISA {

void forward(const Problem& problem, const ForwardTensors& tensors, int threads);
void backward(const Problem& problem, const BackwardTensors& tensors, int threads);
void channels_forward(const ChannelProblem& problem, const ChannelForward& call, int threads);
void channels_backward(const ChannelProblem& problem, const ChannelBackward& call, int threads);
extern const GdnKernels gdn_kernels;

}  // namespace divnorm::DIVNORM_ISA
