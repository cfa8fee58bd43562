// The CPU's calls of a problem, by the kernels of the instruction set in use.
#pragma once

#include "../calls.h"
#include "kernels.h"

namespace divnorm {

// The instruction set in use, of the whole process: the best one until another is chosen.
const CpuKernels& kernels_in_use();
void use(const CpuKernels& kernels);

class CpuCalls : public Calls {
 public:
  explicit CpuCalls(const Problem& problem) : problem_(checked(problem)) {}

  const Problem& problem() const override { return problem_; }
  int64_t scratch_bytes(Direction) const override { return 0; }
  void forward(const ForwardCall& call) const override;
  void backward(const BackwardCall& call) const override;

 private:
  Problem problem_;
};

}  // namespace divnorm
