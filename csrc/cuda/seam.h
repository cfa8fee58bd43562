// The parts of a normalization by whole fields, by themselves, on a device (divnorm_kernels/seam): how each is cut,
// once, and the launches that carry it out.
#pragma once

#include "call.h"

namespace divnorm::cuda {

class Seam {
 public:
  // forward, backward: rows of the table.
  Seam(const Problem& problem, int device, const Device& facts, const Preferences& forward,
       const Preferences& backward);

  int64_t scratch_bytes(Direction direction, Part part) const { return of(direction, part).scratch.bytes; }

  // Each a first or a second part. dl1 is what every |v| adds to the gradient of v.
  void forward(const ForwardCall& call) const;
  void backward(const BackwardCall& call) const;

 private:
  Problem problem(Direction direction, Part part) const;
  const Strategy& of(Direction direction, Part part) const {
    return strategy_[direction == Direction::backward][part == Part::second];
  }
  Kernel kernel_of(Direction direction, Part part) const;
  void run(Direction direction, Part part, const Call& call, Arguments& arguments, const FinishArguments& sums) const;

  Problem problem_;
  const KernelSet& kernels_;
  Strategy strategy_[2][2];
  bool early_;  // whether the device starts launches early
};

}  // namespace divnorm::cuda
