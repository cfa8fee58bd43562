#include "channels_kernels.h"

const divnorm::cuda::ChannelKernels& divnorm::cuda::channel_kernels_float64() {
  static const ChannelKernels kernels = channel_kernels<double>();
  return kernels;
}
const divnorm::cuda::ChannelKernels& divnorm::cuda::channel_kernels_float32() {
  static const ChannelKernels kernels = channel_kernels<float>();
  return kernels;
}
