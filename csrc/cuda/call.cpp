#include "call.h"

#include <stdexcept>

#include "sums.h"

namespace divnorm::cuda {
namespace {

const KernelSet& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return kernels_float64();
    case Dtype::float32: return kernels_float32();
    case Dtype::bfloat16: return kernels_bfloat16();
    default: return kernels_float16();
  }
}

Kernel kernel_of(const KernelSet& kernels, Direction direction, const Strategy& strategy) {
  const bool resident = strategy.resident;
  const Kernels& all = direction == Direction::forward
                           ? (resident ? kernels.resident_forward : kernels.staged_forward)
                           : (resident ? kernels.resident_backward : kernels.staged_backward);
  const Shape& shape = strategy.arguments.shape;
  return all[shape.form == Form::general ? 1 : 0][shape.channels_last ? 1 : 0];
}

Launch launch_of(const Strategy& strategy) {
  return {strategy.blocks, strategy.cluster, strategy.threads, strategy.arguments.shared.bytes};
}

constexpr int kEarlyInGraphs = 12030;  // the first CUDA whose graphs take launches that begin early

// What calls of both directions have.
template <class Given>
Call common(const Given& given) {
  Call call;
  call.tensors.x = given.tensors.x;
  call.tensors.residual = given.tensors.residual;
  call.tensors.weight = given.tensors.weight;
  call.tensors.bias = given.tensors.bias;
  call.tensors.sigma = given.tensors.sigma;
  call.tensors.threshold = given.tensors.threshold;
  call.tensors.sigma_value = given.sigma_value;
  call.tensors.mean = const_cast<void*>(given.tensors.mean);
  call.tensors.rstd = const_cast<void*>(given.tensors.rstd);
  call.scratch = given.place.scratch;
  call.stream = {given.place.device, given.place.stream};
  return call;
}

void* within(const Call& call, int64_t offset) { return static_cast<unsigned char*>(call.scratch) + offset; }

}  // namespace

bool starts_early(const Device& device) { return device.clusters && versions().driver >= kEarlyInGraphs; }

// Errors of the runtime say which kernel they met, and on what.
template <class Body>
void Calls::naming(Direction direction, const Strategy& strategy, Body&& body) const {
  try {
    body();
  } catch (const std::runtime_error& error) {
    std::string shape = std::to_string(problem_.batch) + ", " + std::to_string(problem_.channels);
    for (const int64_t extent : problem_.extent) shape += ", " + std::to_string(extent);
    throw std::runtime_error("CUDA, " + strategy.name() + (direction == Direction::forward ? " forward" : " backward") +
                             " of (" + shape + "): " + error.what());
  }
}

Calls::Calls(const Problem& problem, int device, const Device& facts, const Preferences& forward,
             const Preferences& backward)
    : problem_(checked(problem)),
      kernels_(kernels_for(problem_.dtype)),
      forward_(prepared(Direction::forward, device, facts, forward)),
      backward_(prepared(Direction::backward, device, facts, backward)),
      early_(starts_early(facts)) {}

// The strategy of the table, with smaller or fewer clusters where the device cannot hold its own.
Strategy Calls::prepared(Direction direction, int device, const Device& facts, const Preferences& preferences) const {
  const auto ready = [&](const Strategy& strategy) {
    const Kernel kernel = kernel_of(kernels_, direction, strategy);
    prepare(device, facts.block_shared_bytes, kernel);
    return kernel;
  };
  const Strategy chosen = choose(problem(direction), direction, preferences, facts, [&](const Strategy& tried) {
    int64_t clusters = 0;
    naming(direction, tried, [&] { clusters = clusters_at_once(device, launch_of(tried), ready(tried)); });
    return clusters;
  });
  if (!chosen.resident) naming(direction, chosen, [&] { ready(chosen); });
  return chosen;
}

void Calls::forward(const ForwardCall& call) const {
  Call own = common(call);
  own.tensors.out = call.tensors.y;
  own.tensors.variance = call.tensors.variance;
  own.l1 = call.l1;
  run(Direction::forward, own);
}

void Calls::backward(const BackwardCall& call) const {
  Call own = common(call);
  own.tensors.dy = call.tensors.dy;
  own.tensors.out = call.tensors.dx;
  own.tensors.dl1 = call.dl1;
  own.dweight = call.tensors.dweight;
  own.dbias = call.tensors.dbias;
  own.dsigma = call.tensors.dsigma;
  own.dthreshold = call.tensors.dthreshold;
  own.tensors.dresidual = call.tensors.dresidual;
  run(Direction::backward, own);
}

void Calls::run(Direction direction, const Call& call) const {
  const Strategy& strategy = of(direction);
  const Scratch& scratch = strategy.scratch;
  Arguments arguments = strategy.arguments;
  arguments.tensors = call.tensors;
  if (direction == Direction::forward) {
    if (call.l1 != nullptr) arguments.partials.l1 = within(call, scratch.l1);
  } else {
    if (call.dweight.data != nullptr || call.dbias.data != nullptr || call.dthreshold.data != nullptr) {
      arguments.partials.dweight = within(call, scratch.dweight);
      arguments.partials.dbias = within(call, scratch.dbias);
      if (scratch.dthreshold >= 0) arguments.partials.dthreshold = within(call, scratch.dthreshold);
    } else {
      for (SharedLayout* shared : {&arguments.shared, &arguments.staged.apply_shared})
        shared->dweight = shared->dbias = shared->dthreshold = -1;
    }
    if (call.dsigma.data != nullptr && problem_.suppression.present)
      arguments.partials.dsigma = within(call, scratch.dsigma);
  }
  const FinishArguments sums = sums_of(direction, call);
  SumsRoom room;
  for (int i = 0; i < sums.count; ++i) room.add(sums.reduction[i]);
  arguments.partials.counters = sums.counters;
  arguments.partials.counter_count = static_cast<int>(room.counters());
  naming(direction, strategy, [&] {
    Launch launch = launch_of(strategy);
    if (!strategy.resident) {
      auto* counters = static_cast<int*>(within(call, scratch.counters));
      arguments.staged.counters = counters;
      arguments.staged.maps = scratch.maps < 0 ? nullptr : within(call, scratch.maps);
      arguments.staged.merged = scratch.merged < 0 ? nullptr : within(call, scratch.merged);
      start({ceil_div(scratch.counter_count, kFinishThreads), 1, kFinishThreads, 0}, call.stream, kernels_.clear,
            {counters, scratch.counter_count});
      launch.early = early_;
    }
    start(launch, call.stream, kernel_of(kernels_, direction, strategy), arguments);
    if (sums.count == 0) return;
    const int bytes = room.threads * static_cast<int>(bytes_of(problem_.compute()));
    start({room.blocks, 1, room.threads, bytes, early_}, call.stream, kernels_.finish, sums);
  });
}

// The sums over what a call's blocks leave.
FinishArguments Calls::sums_of(Direction direction, const Call& call) const {
  const Strategy& strategy = of(direction);
  const Scratch& scratch = strategy.scratch;
  FinishArguments all;
  all.slices = within(call, scratch.slices);
  all.counters = static_cast<int*>(within(call, scratch.slice_counters));
  const auto add = [&](const Reduction& reduction) { all.reduction[all.count++] = cut(reduction); };
  if (direction == Direction::forward) {
    if (call.l1 != nullptr) {
      const double share = 1.0 / static_cast<double>(problem_.numel());
      add({within(call, scratch.l1), scratch.l1_slots, 1, 1, 0, share, {}, {call.l1, problem_.compute(), 1}});
    }
    return all;
  }
  const int64_t size = problem_.affine_size();
  if (call.dweight.data != nullptr)
    add({within(call, scratch.dweight), scratch.affine_slots, size, size, 1, 1.0, {}, call.dweight});
  if (call.dbias.data != nullptr)
    add({within(call, scratch.dbias), scratch.affine_slots, size, size, 1, 1.0, {}, call.dbias});
  if (call.dthreshold.data != nullptr && problem_.activation == Activation::tlu)
    add({within(call, scratch.dthreshold), scratch.affine_slots, size, size, 1, 1.0, {}, call.dthreshold});
  if (call.dsigma.data != nullptr && problem_.suppression.present) {
    const Shape& shape = strategy.arguments.shape;
    const int64_t sigmas = call.dsigma.count, slots = scratch.sigma_slots;
    // Of whole fields, and for p = 1, the sums have in them what sigma brings.
    add({within(call, scratch.dsigma), sigmas == 1 ? slots * shape.groups : slots, sigmas, 1, slots, -1.0,
         shape.whole || shape.absolute ? Parameter{} : call.tensors.sigma, call.dsigma});
  }
  return all;
}

}  // namespace divnorm::cuda
