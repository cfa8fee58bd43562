// A geometry on a device: the strategy of each direction, chosen once, and the calls that carry it out.
#pragma once

#include "../plan.h"
#include "launch.h"
#include "strategy.h"

namespace divnorm::cuda {

struct Call {
  Tensors tensors;
  Parameter dweight, dbias, dsigma;  // data null: not wanted
  void* l1 = nullptr;                // null: not wanted; in the type of the sums
  void* scratch = nullptr;           // of Calls::scratch_bytes
  Stream stream;
};

class Calls {
 public:
  // The plan must outlive this.
  Calls(const Plan& plan, int device, const Device& facts, const Preferences& forward, const Preferences& backward);

  int64_t scratch_bytes(Direction direction) const { return of(direction).scratch.bytes; }
  std::string strategy(Direction direction) const { return of(direction).name(); }
  const Problem& problem() const { return problem_; }
  void run(Direction direction, const Call& call) const;

 private:
  const Strategy& of(Direction direction) const { return direction == Direction::forward ? forward_ : backward_; }
  Strategy prepared(Direction direction, int device, const Device& facts, const Preferences& preferences) const;
  void finish(Direction direction, const Call& call) const;
  template <class Body>
  void naming(Direction direction, const Strategy& strategy, Body&& body) const;

  const Problem& problem_;
  const KernelSet& kernels_;
  Strategy forward_, backward_;
};

}  // namespace divnorm::cuda
