// A problem on a device: the strategy of each direction, chosen once, and the calls that carry it out.
#pragma once

#include "../calls.h"
#include "launch.h"
#include "strategy.h"

namespace divnorm::cuda {

struct Call {
  Tensors tensors;
  Parameter dweight, dbias, dsigma, dthreshold;  // data null: not wanted
  void* l1 = nullptr;                            // null: not wanted; in the type of the sums
  void* scratch = nullptr;                       // of Calls::scratch_bytes
  Stream stream;
};

// Whether launches on such a device may begin early: those of clusters do.
bool starts_early(const Device& device);

class Calls : public divnorm::Calls {
 public:
  Calls(const Problem& problem, int device, const Device& facts, const Preferences& forward,
        const Preferences& backward);

  const Problem& problem() const override { return problem_; }
  int64_t scratch_bytes(Direction direction) const override { return of(direction).scratch.bytes; }
  std::string strategy(Direction direction) const { return of(direction).name(); }
  void forward(const ForwardCall& call) const override;
  void backward(const BackwardCall& call) const override;

 private:
  // What a direction computes.
  Problem problem(Direction direction) const {
    return direction == Direction::forward ? problem_ : problem_.in_backward();
  }
  void run(Direction direction, const Call& call) const;
  const Strategy& of(Direction direction) const { return direction == Direction::forward ? forward_ : backward_; }
  Strategy prepared(Direction direction, int device, const Device& facts, const Preferences& preferences) const;
  FinishArguments sums_of(Direction direction, const Call& call) const;
  template <class Body>
  void naming(Direction direction, const Strategy& strategy, Body&& body) const;

  Problem problem_;
  const KernelSet& kernels_;
  Strategy forward_, backward_;
  bool early_;  // whether the device starts launches early
};

}  // namespace divnorm::cuda
