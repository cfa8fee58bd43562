// Runs a case with the sums over partial sums made inside the kernels (cuda/finish_inside.h), whatever lies in scratch
// memory before, and as a graph does that starts the same launch again.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cuda_runner.h"

namespace divnorm::tests {

constexpr int kSummingBlocks = 3;
constexpr int kManyMultiprocessors = 16;  // a grid that they do not hold at once has a launch behind it

// A setting that brings a case to the named strategy, with sums inside.
inline std::optional<Setting> finishing(const std::string& strategy, const Case& c, Dtype dtype, int cluster,
                                        bool largest = false) {
  std::optional<Setting> found = setting_for(strategy, c, dtype, cluster, largest);
  if (!found) return found;
  found->preferences.finish_inside = kSummingBlocks;
  found->device.multiprocessors = kManyMultiprocessors;
  return found;
}

// What a launch finds in its flags. own_number: as if nobody had set them to zero.
enum Flags : int { ones, zeros, last_number, as_it_left_them, own_number };

class FinishingCalls : public Calls {
 public:
  FinishingCalls(const Case& c, Dtype dtype, const Setting& setting, Flags found)
      : problem_(problem_of(c, dtype)), found_(found) {
    for (const Direction direction : {Direction::forward, Direction::backward})
      strategy_[direction == Direction::backward] =
          cuda::choose(of(direction), direction, setting.preferences, setting.device);
  }
  const Problem& problem() const override { return problem_; }
  int64_t scratch_bytes(Direction direction) const override { return strategy(direction).scratch.bytes; }
  void forward(const ForwardCall& call) const override { run(Direction::forward, cuda::call_of(call)); }
  void backward(const BackwardCall& given) const override {
    cuda::Call call = cuda::call_of(given);
    call.tensors.l1_numbers = static_cast<double>(problem_.numel());
    run(Direction::backward, call);
  }
  const cuda::Strategy& strategy(Direction direction) const { return strategy_[direction == Direction::backward]; }

 private:
  Problem of(Direction direction) const { return direction == Direction::forward ? problem_ : problem_.in_backward(); }
  void run(Direction direction, const cuda::Call& call) const {
    const cuda::Strategy& strategy = this->strategy(direction);
    const Problem problem = of(direction);
    const cuda::KernelSet& kernels = cuda::kernels_for(problem.dtype);
    const cuda::Kernel kernel = cuda::kernel_of(kernels, direction, strategy);
    cuda::Arguments arguments = cuda::arguments_of(problem, direction, strategy, call);
    const cuda::FinishArguments sums = cuda::sums_of(problem, direction, strategy, call);
    uint64_t* const flags = arguments.inside.flags;
    const int64_t all = strategy.summing_blocks * strategy.blocks;
    const auto forget = [&](uint64_t number) {  // and what earlier launches have left
      for (int i = 0; i < sums.count; ++i) {
        const Parameter& result = sums.reduction[i].result;
        std::memset(result.data, 0xff, result.count * bytes_of(result.dtype));
      }
      std::memset(call.scratch, 0xff, strategy.scratch.bytes);
      std::fill_n(flags, all, number);
    };
    const auto first = [&] {
      cuda::start_all(strategy, kernels, kernel, arguments, sums, problem.compute(), call.stream, false);
      const int64_t used = int64_t{arguments.inside.blocks} * strategy.blocks;
      if (std::any_of(flags, flags + used, [](uint64_t flag) { return flag != 0; }))
        throw std::logic_error("flags are not zero behind the launch");
    };
    forget(found_ == zeros ? 0 : ~uint64_t{0});
    first();
    if (found_ == last_number) {
      forget(arguments.inside.number);
      first();
    } else if (found_ == as_it_left_them || found_ == own_number) {
      forget(found_ == own_number ? arguments.inside.number : 0);
      cuda::start(cuda::launch_of(strategy), call.stream, kernel, arguments);
    }
  }

  Problem problem_;
  Flags found_;
  cuda::Strategy strategy_[2];
};

inline Results run_finishing(const Case& c, Dtype dtype, const Inputs& in, const Numbers& grad, const Setting& setting,
                             Flags found) {
  const FinishingCalls calls(c, dtype, setting, found);
  for (const Direction direction : {Direction::forward, Direction::backward})
    check(calls.strategy(direction).summing_blocks > 0, c.name + ": sums inside the kernel");
  return run(c, dtype, in, grad, calls);
}

}  // namespace divnorm::tests
