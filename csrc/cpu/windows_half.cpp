// Compiled once per instruction set, as kernels.cpp is; in two files, for two processors to compile.
#include "windows.h"

namespace divnorm::DIVNORM_ISA {

template void window_forward<BFloat16>(const Problem&, const ForwardTensors&, int);
template void window_backward<BFloat16>(const Problem&, const BackwardTensors&, int);
template void window_forward<Float16>(const Problem&, const ForwardTensors&, int);
template void window_backward<Float16>(const Problem&, const BackwardTensors&, int);

}  // namespace divnorm::DIVNORM_ISA
