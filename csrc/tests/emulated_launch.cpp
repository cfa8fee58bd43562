// Launches for the emulated device: kernels run at once, in this thread.
#include <cstring>
#include <stdexcept>
#include <string>

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

// As it is, within the driver's limits.
TensorMap described(int, const BoxedTensor& tensor) {
  constexpr int64_t kMostExtent = int64_t{1} << 32, kMostPitch = int64_t{1} << 40;
  const auto [rows, row_bytes] = tensor.box;
  if (rows < 1 || rows > kMostOfBox || row_bytes < kBoxWord || row_bytes > kMostOfBox * kBoxWord)
    throw std::runtime_error("a box of " + std::to_string(rows) + " rows of " + std::to_string(row_bytes) + " bytes");
  if (rows > tensor.rows || row_bytes > tensor.pitch || tensor.rows > kMostExtent || tensor.pitch >= kMostPitch)
    throw std::runtime_error("a tensor of " + std::to_string(tensor.rows) + " rows that a box does not fit");
  if (row_bytes % kVectorBytes != 0 || tensor.pitch % kVectorBytes != 0 ||
      reinterpret_cast<uintptr_t>(tensor.first) % kVectorBytes != 0)
    throw std::runtime_error("boxes, rows or a tensor at no multiples of 16 bytes");
  TensorMap map;
  static_assert(sizeof tensor <= sizeof map);
  std::memcpy(map.words, &tensor, sizeof tensor);
  return map;
}

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
