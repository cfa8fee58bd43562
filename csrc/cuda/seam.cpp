#include "seam.h"

#include "sums.h"

namespace divnorm::cuda {
namespace {

std::string name_of(Direction direction, Part part) {
  if (direction == Direction::forward) return part == Part::first ? "statistics of rows" : "normalization by rows";
  return part == Part::first ? "sums over rows" : "gradient by rows";
}

}  // namespace

Seam::Seam(const Problem& problem, int device, const Device& facts, const Preferences& forward,
           const Preferences& backward)
    : problem_(checked(problem)), kernels_(kernels_for(problem_.dtype)), early_(starts_early(facts)) {
  if (!problem_.whole || !problem_.summation.present || !problem_.suppression.present || problem_.p != 2)
    throw std::invalid_argument("rows are of fields that are whole and both there, with p = 2");
  for (const Direction direction : {Direction::forward, Direction::backward})
    for (const Part part : {Part::first, Part::second}) {
      const Preferences& preferences = direction == Direction::forward ? forward : backward;
      strategy_[direction == Direction::backward][part == Part::second] =
          choose(this->problem(direction, part), direction, part, preferences, facts);
      naming(
          problem_, [&] { return name_of(direction, part); },
          [&] { prepare(device, facts.block_shared_bytes, kernel_of(direction, part)); });
    }
}

Problem Seam::problem(Direction direction, Part part) const {
  if (direction == Direction::backward) return problem_.in_backward();
  Problem problem = problem_;
  if (part == Part::first) {  // mean and variance are the same whatever stands behind them
    problem.activation = Activation::none;
    problem.residual = false;
    problem.subtract_mean = true;
  }
  return problem;
}

Kernel Seam::kernel_of(Direction direction, Part part) const {
  if (direction == Direction::backward && part == Part::first) return kernels_.seam_sums[problem_.channels_last];
  return cuda::kernel_of(kernels_, direction, of(direction, part));
}

void Seam::forward(const ForwardCall& given) const {
  const Part part = given.tensors.part;
  const Problem problem = this->problem(Direction::forward, part);
  const Strategy& strategy = of(Direction::forward, part);
  Call call = call_of(given);
  if (part == Part::first) {  // the kernel makes 1/s too: of any sigma, into scratch memory
    call.tensors.sigma_value = 1;
    call.tensors.rstd = within(call, strategy.scratch.maps);
  }
  Arguments arguments = arguments_of(problem, Direction::forward, strategy, call);
  run(Direction::forward, part, call, arguments, sums_of(problem, Direction::forward, strategy, call));
}

void Seam::backward(const BackwardCall& given) const {
  const Part part = given.tensors.part;
  const Problem problem = this->problem(Direction::backward, part);
  const Strategy& strategy = of(Direction::backward, part);
  const Call call = call_of(given);
  Arguments arguments = arguments_of(problem, Direction::backward, strategy, call);
  FinishArguments sums = sums_of(problem, Direction::backward, strategy, call);
  if (part == Part::first) {
    const int64_t numbers = kTotals * problem.map_rows();
    Reduction of_rows = row_sums(strategy.scratch, numbers);
    of_rows.source = arguments.staged.merged;
    of_rows.result = {given.tensors.sums, problem.compute(), numbers};
    sums.reduction[sums.count++] = cut(of_rows);
  } else {
    // These are all that the pass reads of the maps in scratch memory, where they are neighbours.
    static_assert(backward_map::offset == backward_map::slope + 1);
    const int64_t before = backward_map::slope * problem.map_bytes();
    arguments.staged.maps = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(given.tensors.slopes) - before);
  }
  run(Direction::backward, part, call, arguments, sums);
}

void Seam::run(Direction direction, Part part, const Call& call, Arguments& arguments,
               const FinishArguments& sums) const {
  naming(
      problem_, [&] { return name_of(direction, part); },
      [&] {
        start_all(of(direction, part), kernels_, kernel_of(direction, part), arguments, sums, problem_.compute(),
                  call.stream, early_);
      });
}

}  // namespace divnorm::cuda
