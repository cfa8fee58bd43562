#include "call.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <random>

#include "sums.h"

namespace divnorm::cuda {
namespace {

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

std::string name_of(Direction direction, const Strategy& strategy) {
  return strategy.name() + (direction == Direction::forward ? " forward" : " backward");
}

// The tensors as large as x, as boxed:: numbers them.
std::array<const void*, boxed::count> large(const Tensors& t) { return {t.x, t.dy, t.residual, t.out, t.dresidual}; }

// They as copies of boxes see them.
void describe(Arguments& arguments, Dtype dtype, int device) {
  const Shape& shape = arguments.shape;
  const int64_t rows = shape.channels_last ? shape.positions : shape.channels;
  const int64_t pitch = (shape.channels_last ? shape.channels : shape.positions) * bytes_of(dtype);
  const auto tensors = large(arguments.tensors);
  for (int tensor = 0; tensor < boxed::count; ++tensor)
    for (int which = 0; which < 2; ++which) {
      const Boxes& box = arguments.pipeline.boxes[which];
      if (tensors[tensor] == nullptr || box.rows == 0) continue;
      arguments.boxed[tensor][which] = described(device, {tensors[tensor], shape.batch * rows, pitch, box});
    }
}

}  // namespace

Call call_of(const ForwardCall& given) {
  Call call = common(given);
  call.tensors.out = given.tensors.y;
  call.tensors.variance = given.tensors.variance;
  call.l1 = given.l1;
  return call;
}

Call call_of(const BackwardCall& given) {
  Call call = common(given);
  call.tensors.dy = given.tensors.dy;
  call.tensors.out = given.tensors.dx;
  call.tensors.dl1 = given.dl1;
  call.dweight = given.tensors.dweight;
  call.dbias = given.tensors.dbias;
  call.dsigma = given.tensors.dsigma;
  call.dthreshold = given.tensors.dthreshold;
  call.tensors.dresidual = given.tensors.dresidual;
  return call;
}

const KernelSet& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return kernels_float64();
    case Dtype::float32: return kernels_float32();
    case Dtype::bfloat16: return kernels_bfloat16();
    default: return kernels_float16();
  }
}

Kernel kernel_of(const KernelSet& kernels, Direction direction, const Strategy& strategy) {
  const bool forward = direction == Direction::forward;
  const Kernels* all = forward ? &kernels.staged_forward : &kernels.staged_backward;
  if (strategy.method == Method::resident) all = forward ? &kernels.resident_forward : &kernels.resident_backward;
  if (strategy.method == Method::pipelined) all = forward ? &kernels.pipelined_forward : &kernels.pipelined_backward;
  const Shape& shape = strategy.arguments.shape;
  return (*all)[shape.form == Form::general ? 1 : 0][shape.channels_last ? 1 : 0];
}

Launch launch_of(const Strategy& strategy) {
  return {strategy.blocks, strategy.cluster, strategy.threads, strategy.arguments.shared.bytes};
}

Arguments arguments_of(const Problem& problem, Direction direction, const Strategy& strategy, const Call& call) {
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
    if (call.dsigma.data != nullptr && problem.suppression.present)
      arguments.partials.dsigma = within(call, scratch.dsigma);
  }
  if (scratch.counters >= 0) arguments.staged.counters = static_cast<int*>(within(call, scratch.counters));
  if (scratch.maps >= 0) arguments.staged.maps = within(call, scratch.maps);
  if (scratch.merged >= 0) arguments.staged.merged = within(call, scratch.merged);
  if (scratch.flags >= 0) arguments.inside.flags = static_cast<uint64_t*>(within(call, scratch.flags));
  return arguments;
}

FinishArguments sums_of(const Problem& problem, Direction direction, const Strategy& strategy, const Call& call) {
  const Scratch& scratch = strategy.scratch;
  const bool inside = strategy.summing_blocks > 0;
  FinishArguments all;
  if (!inside) {
    all.slices = within(call, scratch.slices);
    all.counters = static_cast<int*>(within(call, scratch.slice_counters));
  }
  const auto add = [&](Reduction reduction, int64_t source, const Parameter& result) -> Reduction& {
    reduction.source = within(call, source);
    reduction.result = result;
    return all.reduction[all.count++] = inside ? cut_inside(reduction, bytes_of(problem.compute())) : cut(reduction);
  };
  if (direction == Direction::forward) {
    if (call.l1 != nullptr)
      add(l1_sums(scratch), scratch.l1, {call.l1, problem.compute(), 1}).factor =
          1.0 / static_cast<double>(problem.numel());
    return all;
  }
  const Reduction affine = affine_sums(scratch, problem.affine_size());
  if (call.dweight.data != nullptr) add(affine, scratch.dweight, call.dweight);
  if (call.dbias.data != nullptr) add(affine, scratch.dbias, call.dbias);
  if (call.dthreshold.data != nullptr && problem.activation == Activation::tlu)
    add(affine, scratch.dthreshold, call.dthreshold);
  if (call.dsigma.data != nullptr && problem.suppression.present) {
    const Shape& shape = strategy.arguments.shape;
    Reduction& sigma = add(sigma_sums(scratch, shape.groups, call.dsigma.count), scratch.dsigma, call.dsigma);
    sigma.factor = -1;
    // Of whole fields, and for p = 1, the sums have in them what sigma brings.
    if (!shape.whole && !shape.absolute) sigma.sigma = call.tensors.sigma;
  }
  return all;
}

FinishInside inside_of(const Strategy& strategy, const FinishArguments& sums, uint64_t* flags) {
  // Odd numbers from anywhere on: not zero, which flags are left at, and none that other memory is likely to hold.
  static std::atomic<uint64_t> next = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random() | 1;
  }();
  FinishInside inside;
  inside.sums = sums;
  int64_t sets = 0;
  for (int i = 0; i < sums.count; ++i) sets += sums.reduction[i].sets;
  inside.blocks = static_cast<int>(std::min<int64_t>(strategy.summing_blocks, sets));
  inside.grid = strategy.blocks;
  inside.number = next.fetch_add(2);
  inside.flags = flags;
  return inside;
}

void start_all(const Strategy& strategy, const KernelSet& kernels, Kernel kernel, Arguments& arguments,
               const FinishArguments& sums, Dtype compute, Stream stream, bool early) {
  if (strategy.summing_blocks > 0) {
    arguments.inside = inside_of(strategy, sums, arguments.inside.flags);
    return start(launch_of(strategy), stream, kernel, arguments);
  }
  SumsRoom room;
  for (int i = 0; i < sums.count; ++i) room.add(sums.reduction[i]);
  arguments.partials.counters = sums.counters;
  arguments.partials.counter_count = static_cast<int>(room.counters());
  Launch launch = launch_of(strategy);
  if (const int64_t count = strategy.scratch.counter_count; count > 0) {
    start({ceil_div(count, kFinishThreads), 1, kFinishThreads, 0}, stream, kernels.clear,
          {arguments.staged.counters, count});
    launch.early = early;
  }
  start(launch, stream, kernel, arguments);
  if (sums.count == 0) return;
  const int bytes = room.threads * static_cast<int>(bytes_of(compute));
  start({room.blocks, 1, room.threads, bytes, early}, stream, kernels.finish, sums);
}

bool starts_early(const Device& device) { return device.clusters && versions().driver >= kEarlyInGraphs; }

Calls::Calls(const Problem& problem, int device, const Device& facts, const Preferences& forward,
             const Preferences& backward)
    : problem_(checked(problem)),
      kernels_(kernels_for(problem_.dtype)),
      forward_(chosen(Direction::forward, device, facts, forward)),
      backward_(chosen(Direction::backward, device, facts, backward)),
      early_(starts_early(facts)) {}

Calls::Chosen Calls::chosen(Direction direction, int device, const Device& facts, Preferences preferences) const {
  Chosen all{prepared(direction, device, facts, preferences), std::nullopt};
  preferences.pipeline = 0;
  if (all.first.method == Method::pipelined) all.second = prepared(direction, device, facts, preferences);
  return all;
}

// The strategy of the table, with smaller or fewer clusters where the device cannot hold its own.
Strategy Calls::prepared(Direction direction, int device, const Device& facts, const Preferences& preferences) const {
  const auto ready = [&](const Strategy& strategy) {
    const Kernel kernel = kernel_of(kernels_, direction, strategy);
    prepare(device, facts.block_shared_bytes, kernel);
    return kernel;
  };
  const Strategy chosen = choose(problem(direction), direction, preferences, facts, [&](const Strategy& tried) {
    int64_t clusters = 0;
    naming(
        problem_, [&] { return name_of(direction, tried); },
        [&] { clusters = clusters_at_once(device, launch_of(tried), ready(tried)); });
    return clusters;
  });
  if (chosen.method == Method::staged)
    naming(problem_, [&] { return name_of(direction, chosen); }, [&] { ready(chosen); });
  return chosen;
}

void Calls::forward(const ForwardCall& call) const { run(Direction::forward, call_of(call)); }

void Calls::backward(const BackwardCall& call) const {
  Call own = call_of(call);
  own.tensors.l1_numbers = static_cast<double>(problem_.numel());
  run(Direction::backward, own);
}

const Strategy& Calls::taken(Direction direction, const Call& call) const {
  const Chosen& all = of(direction);
  if (!all.second) return all.first;
  for (const void* address : large(call.tensors))
    if (reinterpret_cast<uintptr_t>(address) % kVectorBytes != 0) return *all.second;
  return all.first;
}

void Calls::run(Direction direction, const Call& call) const {
  const Strategy& strategy = taken(direction, call);
  Arguments arguments = arguments_of(problem_, direction, strategy, call);
  const FinishArguments sums = sums_of(problem_, direction, strategy, call);
  naming(
      problem_, [&] { return name_of(direction, strategy); },
      [&] {
        describe(arguments, problem_.dtype, call.stream.device);
        start_all(strategy, kernels_, kernel_of(kernels_, direction, strategy), arguments, sums, problem_.compute(),
                  call.stream, early_);
      });
}

}  // namespace divnorm::cuda
