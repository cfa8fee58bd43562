// The one way to start a kernel: on a GPU (launch.cpp), or emulated for the tests (tests/emulated_launch.cpp).
// Errors are std::runtime_error with the runtime's name and words for them.
#pragma once

#include <cstdint>

#include "channels_program.h"
#include "kernels.h"

namespace divnorm::cuda {

struct Launch {
  int64_t blocks = 0;
  int cluster = 1, threads = 0, shared_bytes = 0;
  // Whether it may begin before the launch in front of it has ended, for which its kernel then waits.
  bool early = false;
};

struct Stream {
  int device = 0;
  uintptr_t handle = 0;
};

// The newest CUDA that the driver supports, 0 where there is no driver, and the runtime's own: 12040 is 12.4.
struct Versions {
  int driver = 0, runtime = 0;
};
Versions versions();

// Before a kernel's first launch on a device, of which a block can have most_shared_bytes of shared memory.
void prepare(int device, int most_shared_bytes, Kernel kernel);
void prepare(int device, int most_shared_bytes, ChannelKernel kernel);

// How many clusters of this launch the device holds at once, 0 where it cannot start one: the multiprocessors of a
// cluster are neighbours, and not every device has as many of them side by side. The kernel has been prepared.
int64_t clusters_at_once(int device, const Launch& launch, Kernel kernel);

// A tensor as copies of boxes take it. Its address and pitch, and a box's width, are multiples of 16 bytes.
TensorMap described(int device, const BoxedTensor& tensor);

void start(const Launch& launch, Stream stream, Kernel kernel, const Arguments& arguments);
void start(const Launch& launch, Stream stream, FinishKernel kernel, const FinishArguments& arguments);
void start(const Launch& launch, Stream stream, ClearKernel kernel, const ClearArguments& arguments);
void start(const Launch& launch, Stream stream, ChannelKernel kernel, const ChannelArguments& arguments);

}  // namespace divnorm::cuda
