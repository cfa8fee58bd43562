// A channel normalization on a device: how each direction is cut, once, and the launches that carry it out.
#pragma once

#include "launch.h"
#include "strategy.h"

namespace divnorm::cuda {

ChannelCut cut(const ChannelProblem& problem, Direction direction, const Device& device);

class Channels {
 public:
  Channels(const ChannelProblem& problem, int device, const Device& facts);

  int64_t scratch_bytes(Direction direction) const;
  const ChannelCut& cut_of(Direction direction) const { return direction == Direction::forward ? forward_ : backward_; }
  // scratch: of scratch_bytes
  void forward(const ChannelForward& call, void* scratch, uintptr_t stream) const;
  void backward(const ChannelBackward& call, void* scratch, uintptr_t stream) const;

 private:
  ChannelArguments arguments(Direction direction, const ChannelScalars& scalars) const;
  void run(Direction direction, const ChannelArguments& arguments, void* dlearned, uintptr_t stream) const;

  ChannelProblem problem_;
  int device_;
  ChannelCut forward_, backward_;
  bool early_;  // whether the device starts launches early
};

}  // namespace divnorm::cuda
