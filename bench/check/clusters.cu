// How many clusters run at once: prints, as JSON, their number by the blocks to a multiprocessor that share its memory,
// and by the blocks of a cluster.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kThreads = 256, kLargest = 16;

__global__ void __launch_bounds__(kThreads, 2) kernel() {}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

int clusters(int blocks, int shared_bytes, int multiprocessors) {
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = blocks;
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks * multiprocessors);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &size;
  config.numAttrs = 1;
  int found = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&found, kernel, &config);
  if (error == cudaErrorInvalidClusterSize) {
    cudaGetLastError();
    return 0;
  }
  check(error, "cudaOccupancyMaxActiveClusters");
  return found;
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  const int most = static_cast<int>(device.sharedMemPerBlockOptin);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size");
  std::printf("{");
  for (int sharing = 1; sharing <= 2; ++sharing) {
    const int shared_bytes = static_cast<int>(device.sharedMemPerMultiprocessor / sharing) -
                             static_cast<int>(device.reservedSharedMemPerBlock);
    std::printf("%s\"%d\": {", sharing == 1 ? "" : ", ", sharing);
    for (int blocks = 2; blocks <= kLargest; ++blocks) {
      const int at_once = clusters(blocks, shared_bytes, device.multiProcessorCount);
      std::printf("%s\"%d\": %d", blocks == 2 ? "" : ", ", blocks, at_once);
    }
    std::printf("}");
  }
  std::printf("}\n");
}
