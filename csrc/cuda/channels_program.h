// What a kernel of channel normalizations is told: the call, its tensors, and how the work is cut. Plain data, passed
// by value.
#pragma once

#include "../channels.h"
#include "program.h"

namespace divnorm::cuda {

constexpr int kChannelThreads = 256, kChannelBlocks = 3;  // as kResidentThreads and kResidentBlocks (program.h)
constexpr int kMostChannels = 1 << 26;                    // a tile's numbers are counted in int
constexpr int kMostChannelBlocks = 1 << 10;               // a single block adds up the sums that they leave
constexpr int kForwardArrays = 2, kBackwardArrays = 3;

// How D^-beta is computed: by roots where beta is a number that has some.
enum class Power : int { general, half, three_quarters, one };

// The channels that channel c sees: all, or c - before .. c + after.
struct ChannelWindow {
  bool exponential = false;
  int before = 0, after = 0;
};

// A tile is all channels of some positions: of a stretch of one outer block, or of `outers` whole ones. A block of
// threads holds it in arrays, in the type of the sums; a thread works on segments of the channels at one position.
//
// In memory a tile is rows without gaps: the channels of a stretch, or the outer blocks. In an array row r begins at
// r * pitch; the channels of a position are `step` apart. The threads of a warp work on neighbouring positions, and
// where these are fewer on neighbouring segments too. They meet in no bank of shared memory: positions are a power of
// two and segments odd, and outer blocks lie an odd multiple of the warp's segments apart.
struct ChannelCut {
  bool far = false;       // the arrays lie in scratch memory: shared memory holds no position
  int64_t stretches = 0;  // of an outer block; 0: whole ones
  int outers = 0, positions = 0;
  int row = 0, pitch = 0, step = 0;
  Divider by_row;
  int numbers = 0;  // of an array
  int segment = 0, segments = 0;
  int64_t tiles = 0;
  int blocks = 0, threads = 0, shared_bytes = 0;
};

struct ChannelArguments {
  int64_t outer = 0, inner = 1;
  int channels = 0;
  ChannelWindow window;
  bool squared = false;
  Power power = Power::general;
  ChannelScalars scalars;
  ChannelCut cut;
  const void *x = nullptr, *dy = nullptr;
  void* out = nullptr;      // y, or dx; null: not wanted
  bool sums = false;        // those of dlearned are wanted
  void* scratch = nullptr;  // kScalars sums of every block, then its arrays where they are far
};

using ChannelKernel = void (*)(const ChannelArguments);

// By whether the arrays are far.
struct ChannelKernels {
  ChannelKernel forward[2], backward[2];
};

const ChannelKernels& channel_kernels_float64();
const ChannelKernels& channel_kernels_float32();
const ChannelKernels& channel_kernels_bfloat16();
const ChannelKernels& channel_kernels_float16();

}  // namespace divnorm::cuda
