// Launches for the emulated device: kernels run at once, in this thread.
#include <cstring>

#include "../cuda/launch.h"
#include "emulated_device.h"

namespace divnorm::cuda {

Versions versions() { return {}; }

void prepare(int, int, Kernel) {}

int64_t clusters_at_once(int, const Launch& launch, Kernel) {
  return launch.cluster <= emulation::largest_cluster ? emulation::most_clusters : 0;
}

void start(const Launch& launch, Stream, Kernel kernel, const Arguments& arguments) {
  emulation::run(launch.blocks, launch.cluster, launch.threads, launch.shared_bytes, [&] { kernel(arguments); });
}
void start(const Launch& launch, Stream, FinishKernel kernel, const FinishArguments& arguments) {
  emulation::run(launch.blocks, launch.cluster, launch.threads, launch.shared_bytes, [&] { kernel(arguments); });
}

void clear(void* memory, int64_t bytes, Stream) { std::memset(memory, 0, static_cast<size_t>(bytes)); }

}  // namespace divnorm::cuda
