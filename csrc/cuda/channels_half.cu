#include "channels_kernels.h"

const divnorm::cuda::ChannelKernels& divnorm::cuda::channel_kernels_bfloat16() {
  static const ChannelKernels kernels = channel_kernels<bfloat16>();
  return kernels;
}
const divnorm::cuda::ChannelKernels& divnorm::cuda::channel_kernels_float16() {
  static const ChannelKernels kernels = channel_kernels<float16>();
  return kernels;
}
