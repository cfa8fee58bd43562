// Calls whose fields are whole; compiled in whole.cpp.
#pragma once

#include "../problem.h"
#include "simd.h"

namespace divnorm::DIVNORM_ISA {

template <class T>
void whole_forward(const Problem& problem, const ForwardTensors& tensors, int threads);
template <class T>
void whole_backward(const Problem& problem, const BackwardTensors& tensors, int threads);

}  // namespace divnorm::DIVNORM_ISA
