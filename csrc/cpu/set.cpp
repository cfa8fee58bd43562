#include "entries.h"
#include "kernels.h"

namespace divnorm::DIVNORM_ISA {

extern const CpuKernels kernels;
const CpuKernels kernels{DIVNORM_ISA_NAME, forward, backward, channels_forward, channels_backward, &gdn_kernels};

}  // namespace divnorm::DIVNORM_ISA
