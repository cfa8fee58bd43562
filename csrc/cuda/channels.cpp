#include "channels.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "call.h"
#include "layout.h"
#include "sums.h"

namespace divnorm::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kTileBytes = 72 << 10;  // three blocks share a multiprocessor
constexpr int64_t kSectorBytes = 32;      // of global memory, the least that moves
constexpr int64_t kBankBytes = 128;       // of shared memory, that it moves at once
constexpr int64_t kTilesWanted = 512;     // where there are positions for them: some for every multiprocessor
constexpr int64_t kNumbersOfThread = 8;   // at least, while threads have segments enough
constexpr int64_t kFarBlocks = 128;       // each with arrays of its own in scratch memory
constexpr int64_t kBoxSegment = 8;        // at least, where the window is as long
constexpr int64_t kLeastSegment = 32, kMostSegments = 32;  // of exponential sums, which go through each twice

const ChannelKernels& channel_kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return channel_kernels_float64();
    case Dtype::float32: return channel_kernels_float32();
    case Dtype::bfloat16: return channel_kernels_bfloat16();
    default: return channel_kernels_float16();
  }
}

ChannelKernel kernel_of(Dtype dtype, Direction direction, bool far) {
  const ChannelKernels& all = channel_kernels_for(dtype);
  return direction == Direction::forward ? all.forward[far] : all.backward[far];
}

int arrays_of(Direction direction) { return direction == Direction::forward ? kForwardArrays : kBackwardArrays; }

int64_t power_of_two_up_to(int64_t number) { return int64_t{1} << (log2_up(number + 1) - 1); }

// Channels of a segment. Of a box it is at most as long as the window, which a thread goes through for each of its
// segments: then a number is read twice; a quarter of that gives long windows four times the threads, for five reads.
// An odd number, as ChannelCut says.
int64_t segment_of(const ChannelProblem& problem) {
  if (problem.exponential) return std::max(kLeastSegment, ceil_div(problem.channels, kMostSegments)) | 1;
  const int64_t window = std::min(problem.before + problem.after + 1, problem.channels);
  return std::max(ceil_div(window, 4), std::min(window, kBoxSegment) - 1) | 1;
}

Power power_of(const ChannelScalars& scalars) {
  const double beta = scalars.value[kScalarBeta];
  return beta == 0.5 ? Power::half : beta == 0.75 ? Power::three_quarters : beta == 1 ? Power::one : Power::general;
}

}  // namespace

ChannelCut cut(const ChannelProblem& problem, Direction direction, const Device& device) {
  const int64_t size = bytes_of(problem.compute()), channels = problem.channels, inner = problem.inner;
  const int64_t sector = kSectorBytes / bytes_of(problem.dtype);
  const int64_t segment = segment_of(problem), segments = ceil_div(channels, segment);
  const int64_t carries = problem.exponential ? 4 * segments : 0, reduction = kChannelThreads / kWarp;
  const int64_t arrays = arrays_of(direction), banks = kBankBytes / size;
  const int64_t of_position = (arrays * channels + carries) * size, other = (arrays * 2 * banks + reduction) * size;
  const auto room = [&](int64_t bytes) { return std::max<int64_t>((bytes - other) / of_position, 0); };

  ChannelCut cut;
  const int64_t wanted = std::max(ceil_div(problem.outer * inner, kTilesWanted), sector);
  const int64_t of_tile = std::min<int64_t>(kTileBytes, device.block_shared_bytes);
  int64_t positions = std::min({wanted, room(of_tile), int64_t{kChannelThreads}});
  positions = std::max(positions, std::min(sector, room(device.block_shared_bytes)));
  cut.far = positions == 0;
  positions = cut.far ? sector : power_of_two_up_to(positions);
  if (inner <= positions) {
    const int64_t outers = std::min(positions / inner, problem.outer), row = channels * inner;
    const int64_t apart = std::max<int64_t>(banks / power_of_two_up_to(outers * inner), 1);
    cut.outers = static_cast<int>(outers);
    cut.positions = static_cast<int>(outers * inner);
    cut.row = static_cast<int>(row);
    cut.pitch = static_cast<int>(round_up(row + apart, 2 * apart) - apart);
    cut.step = static_cast<int>(inner);
    cut.numbers = cut.outers * cut.pitch;
    cut.tiles = ceil_div(problem.outer, outers);
  } else {
    cut.stretches = ceil_div(inner, positions);
    cut.positions = cut.row = cut.pitch = cut.step = static_cast<int>(positions);
    cut.numbers = static_cast<int>(channels * positions);
    cut.tiles = problem.outer * cut.stretches;
  }
  cut.by_row = divider(cut.row);
  cut.segment = static_cast<int>(segment);
  cut.segments = static_cast<int>(segments);
  const int64_t threads = std::max({cut.numbers / kNumbersOfThread, cut.positions * segments, int64_t{1}});
  cut.threads = static_cast<int>(std::min<int64_t>(round_up(threads, kWarp), kChannelThreads));
  cut.blocks = static_cast<int>(std::min<int64_t>(cut.tiles, cut.far ? kFarBlocks : kMostChannelBlocks));
  const int64_t exchanged = std::max(carries * cut.positions, reduction);
  cut.shared_bytes = static_cast<int>(((cut.far ? 0 : arrays * cut.numbers) + exchanged) * size);
  return cut;
}

Channels::Channels(const ChannelProblem& problem, int device, const Device& facts)
    : problem_(problem),
      device_(device),
      forward_(cut(problem, Direction::forward, facts)),
      backward_(cut(problem, Direction::backward, facts)),
      early_(starts_early(facts)) {
  for (const Direction direction : {Direction::forward, Direction::backward})
    prepare(device, facts.block_shared_bytes, kernel_of(problem.dtype, direction, cut_of(direction).far));
}

// The sums of all blocks, then their arrays.
int64_t Channels::scratch_bytes(Direction direction) const {
  const ChannelCut& cut = cut_of(direction);
  const int64_t of_block = kScalars + (cut.far ? int64_t{arrays_of(direction)} * cut.numbers : 0);
  return cut.blocks * of_block * bytes_of(problem_.compute());
}

ChannelArguments Channels::arguments(Direction direction, const ChannelScalars& scalars) const {
  ChannelArguments arguments;
  arguments.outer = problem_.outer;
  arguments.inner = problem_.inner;
  arguments.channels = static_cast<int>(problem_.channels);
  arguments.window = {problem_.exponential, static_cast<int>(problem_.before), static_cast<int>(problem_.after)};
  arguments.squared = problem_.squared;
  arguments.power = power_of(scalars);
  arguments.scalars = scalars;
  arguments.cut = cut_of(direction);
  return arguments;
}

void Channels::forward(const ChannelForward& call, void* scratch, uintptr_t stream) const {
  ChannelArguments arguments = this->arguments(Direction::forward, call.scalars);
  arguments.x = call.x;
  arguments.out = call.y;
  arguments.scratch = scratch;
  run(Direction::forward, arguments, nullptr, stream);
}

void Channels::backward(const ChannelBackward& call, void* scratch, uintptr_t stream) const {
  ChannelArguments arguments = this->arguments(Direction::backward, call.scalars);
  arguments.x = call.x;
  arguments.dy = call.dy;
  arguments.out = call.dx;
  arguments.sums = call.dlearned != nullptr;
  arguments.scratch = scratch;
  run(Direction::backward, arguments, call.dlearned, stream);
}

// Errors of the runtime say which kernel they met, and on what.
void Channels::run(Direction direction, const ChannelArguments& arguments, void* dlearned, uintptr_t stream) const {
  const ChannelCut& own = cut_of(direction);
  const Stream where{device_, stream};
  try {
    start({own.blocks, 1, own.threads, own.shared_bytes}, where, kernel_of(problem_.dtype, direction, own.far),
          arguments);
    if (dlearned == nullptr) return;
    FinishArguments sums;
    sums.count = 1;
    sums.reduction[0] =
        cut({arguments.scratch, own.blocks, kScalars, kScalars, 1, 1.0, {}, {dlearned, problem_.compute(), kScalars}});
    SumsRoom room;
    room.add(sums.reduction[0]);
    const int bytes = room.threads * static_cast<int>(bytes_of(problem_.compute()));
    start({room.blocks, 1, room.threads, bytes, early_}, where, kernels_for(problem_.dtype).finish, sums);
  } catch (const std::runtime_error& error) {
    const std::string shape = std::to_string(problem_.outer) + ", " + std::to_string(problem_.channels) + ", " +
                              std::to_string(problem_.inner);
    throw std::runtime_error(std::string("CUDA, channels ") +
                             (direction == Direction::forward ? "forward" : "backward") + " of (" + shape +
                             "): " + error.what());
  }
}

}  // namespace divnorm::cuda
