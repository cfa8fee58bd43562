// Launches for the emulated device: kernels run at once, in this thread.
#include "../cuda/launch.h"
#include "emulated_device.h"

namespace divnorm::cuda {
namespace {

template <class Arguments>
void run(const Launch& launch, void (*kernel)(const Arguments), const Arguments& arguments, int64_t together = 0) {
  emulation::run(
      launch.blocks, launch.cluster, launch.threads, launch.shared_bytes, launch.early, [&] { kernel(arguments); },
      together);
}

}  // namespace

Versions versions() { return {13000, 13000}; }

void prepare(int, int, Kernel) {}
void prepare(int, int, ChannelKernel) {}

int64_t clusters_at_once(int, const Launch& launch, Kernel) {
  return launch.cluster <= emulation::largest_cluster ? emulation::most_clusters : 0;
}

void start(const Launch& launch, Stream, Kernel kernel, const Arguments& arguments) {
  run(launch, kernel, arguments, arguments.inside.blocks);
}
void start(const Launch& launch, Stream, FinishKernel kernel, const FinishArguments& arguments) {
  run(launch, kernel, arguments);
}
void start(const Launch& launch, Stream, ClearKernel kernel, const ClearArguments& arguments) {
  run(launch, kernel, arguments);
}
void start(const Launch& launch, Stream, ChannelKernel kernel, const ChannelArguments& arguments) {
  run(launch, kernel, arguments);
}

}  // namespace divnorm::cuda
