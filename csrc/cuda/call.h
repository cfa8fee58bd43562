// A problem on a device: the strategy of each direction, chosen once, and the calls that carry it out.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

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

Call call_of(const ForwardCall& given);
Call call_of(const BackwardCall& given);

const KernelSet& kernels_for(Dtype dtype);
Kernel kernel_of(const KernelSet& kernels, Direction direction, const Strategy& strategy);
Launch launch_of(const Strategy& strategy);

inline void* within(const Call& call, int64_t offset) { return static_cast<unsigned char*>(call.scratch) + offset; }

// What the kernel of a strategy is told of a call, and the sums over what its blocks leave. problem: of the direction.
Arguments arguments_of(const Problem& problem, Direction direction, const Strategy& strategy, const Call& call);
FinishArguments sums_of(const Problem& problem, Direction direction, const Strategy& strategy, const Call& call);

// Starts a kernel and what stands around it: zeros for what it counts with, and the sums. early: the device starts
// launches early.
void start_all(const Strategy& strategy, const KernelSet& kernels, Kernel kernel, Arguments& arguments,
               const FinishArguments& sums, Dtype compute, Stream stream, bool early);

// Errors of the runtime say which kernel they met, name(), and on what.
template <class Name, class Body>
void naming(const Problem& problem, Name&& name, Body&& body) {
  try {
    body();
  } catch (const std::runtime_error& error) {
    std::string shape = std::to_string(problem.batch) + ", " + std::to_string(problem.channels);
    for (const int64_t extent : problem.extent) shape += ", " + std::to_string(extent);
    throw std::runtime_error("CUDA, " + name() + " of (" + shape + "): " + error.what());
  }
}

// Whether launches on such a device may begin early: those of clusters do.
bool starts_early(const Device& device);

class Calls : public divnorm::Calls {
 public:
  Calls(const Problem& problem, int device, const Device& facts, const Preferences& forward,
        const Preferences& backward);

  const Problem& problem() const override { return problem_; }
  int64_t scratch_bytes(Direction direction) const override {
    const Chosen& all = of(direction);
    return std::max(all.first.scratch.bytes, all.second ? all.second->scratch.bytes : 0);
  }
  // That of tensors whose addresses are multiples of sixteen.
  std::string strategy(Direction direction) const { return of(direction).first.name(); }
  void forward(const ForwardCall& call) const override;
  void backward(const BackwardCall& call) const override;

 private:
  // What a direction computes.
  Problem problem(Direction direction) const {
    return direction == Direction::forward ? problem_ : problem_.in_backward();
  }
  void run(Direction direction, const Call& call) const;
  // A strategy, and where bulk copies are in it, which take aligned addresses alone, the one for others.
  struct Chosen {
    Strategy first;
    std::optional<Strategy> second;
  };
  const Chosen& of(Direction direction) const { return direction == Direction::forward ? forward_ : backward_; }
  const Strategy& taken(Direction direction, const Call& call) const;
  Chosen chosen(Direction direction, int device, const Device& facts, Preferences preferences) const;
  Strategy prepared(Direction direction, int device, const Device& facts, const Preferences& preferences) const;

  Problem problem_;
  const KernelSet& kernels_;
  Chosen forward_, backward_;
  bool early_;  // whether the device starts launches early
};

}  // namespace divnorm::cuda
