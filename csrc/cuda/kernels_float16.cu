#include "instantiate.h"

const divnorm::cuda::KernelSet& divnorm::cuda::kernels_float16() {
  static const KernelSet set = instantiated<float16>();
  return set;
}
