// Calls with a field that is not whole; compiled in windows_*.cpp.
#pragma once

#include "../problem.h"
#include "simd.h"

namespace divnorm::DIVNORM_ISA {

template <class T>
void window_forward(const Problem& problem, const ForwardTensors& tensors, int threads);
template <class T>
void window_backward(const Problem& problem, const BackwardTensors& tensors, int threads);

}  // namespace divnorm::DIVNORM_ISA
