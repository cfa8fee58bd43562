// Compiled once per instruction set, as kernels.cpp is; in two files, for two processors to compile.
#include "windows.h"

namespace divnorm::DIVNORM_ISA {

template void window_forward<double>(const Problem&, const ForwardTensors&, int);
template void window_backward<double>(const Problem&, const BackwardTensors&, int);
template void window_forward<float>(const Problem&, const ForwardTensors&, int);
template void window_backward<float>(const Problem&, const BackwardTensors&, int);

}  // namespace divnorm::DIVNORM_ISA
