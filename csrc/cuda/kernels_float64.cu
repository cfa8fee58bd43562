#include "instantiate.h"

const divnorm::cuda::KernelSet& divnorm::cuda::kernels_float64() {
  static const KernelSet set = instantiated<double>();
  return set;
}
