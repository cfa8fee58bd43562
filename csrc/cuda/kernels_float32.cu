#include "instantiate.h"

const divnorm::cuda::KernelSet& divnorm::cuda::kernels_float32() {
  static const KernelSet set = instantiated<float>();
  return set;
}
