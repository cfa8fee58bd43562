#include "instantiate.h"

const divnorm::cuda::KernelSet& divnorm::cuda::kernels_bfloat16() {
  static const KernelSet set = instantiated<bfloat16>();
  return set;
}
