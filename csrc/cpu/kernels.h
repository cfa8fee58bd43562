// The CPU backend's entry points. The hot files are compiled once per instruction set, each into a namespace of
// its own; kernels_for() picks the best one this processor runs.
#pragma once

#include "../channels.h"
#include "../gdn.h"

namespace divnorm {

struct CpuKernels {
  const char* name;
  void (*forward)(const Problem&, const ForwardTensors&, int threads);
  void (*backward)(const Problem&, const BackwardTensors&, int threads);
  void (*channels_forward)(const ChannelProblem&, const ChannelForward&, int threads);
  void (*channels_backward)(const ChannelProblem&, const ChannelBackward&, int threads);
  const GdnKernels* gdn;
};

constexpr int kMaxInstructionSets = 3;

// The compiled sets this processor can run, best first; returns how many were written to names.
int supported_instruction_sets(const char* names[kMaxInstructionSets]);

// The kernels of the named set, or of the best one for nullptr; null when the set is unknown or cannot run here.
const CpuKernels* kernels_for(const char* name);

}  // namespace divnorm
