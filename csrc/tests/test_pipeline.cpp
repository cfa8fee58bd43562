// The pipelined kernels on the emulated device: the same bits in whatever order their threads go on, and without any
// one of the words that keep their roles apart either others or an error.
#include <exception>

#include "cuda_runner.h"
#include "share.h"

namespace {

using namespace divnorm;
using namespace divnorm::tests;
using cuda::emulation::kWordNames;
using cuda::emulation::kWords;
using cuda::emulation::Word;
namespace emulation = divnorm::cuda::emulation;

constexpr unsigned kOrders = 400;
constexpr int kAgainSlots = 4;    // as pipeline_plan.cpp has them
constexpr int kComputeWarps = 2;  // of setting()'s threads
constexpr int kWarps = kComputeWarps + (cuda::kMapThreads + cuda::kCopyThreads) / cuda::device::kWarp;

Numbers some(int64_t count, int step) {
  Numbers numbers(count);
  for (int64_t i = 0; i < count; ++i) numbers[i] = static_cast<double>(i * step % 61) / 16 - 2;
  return numbers;
}

// One cluster of two blocks for all samples: each holds a half and little more. twice: of x, as dy comes twice where
// both do not fit.
Setting setting_of(const Case& c, Direction direction, bool twice) {
  std::optional<Setting> found;
  bool boxes = false;
  for (int shared_bytes = 2048; shared_bytes < 1 << 16; shared_bytes += 512) {
    const bool large = c.channels_last && direction == Direction::backward;
    Setting s = setting(2, shared_bytes, large ? 3072 : 1536);  // something for every warp
    s.device.multiprocessors = 1;
    const auto strategy = cuda::choose(problem_of(c, Dtype::float32), direction, s.preferences, s.device);
    const bool as_wanted = (strategy.arguments.pipeline.again_slots > 0) == twice;
    if (strategy.name() == "pipelined" && strategy.cluster == 2 && as_wanted) {
      found = s;  // with the most slots
      boxes = strategy.arguments.pipeline.boxes[0].rows > 0;
    }
  }
  check(found.has_value(), c.name + ": a cluster of two blocks");
  check(boxes == (c.groups > 1 || !c.channels_last), c.name + ": boxes");
  return found.value_or(setting(0, 1 << 16));
}

// A call, direction by direction.
class Call {
 public:
  Call(const Case& c, const Setting& s)
      : calls_(problem_of(c, Dtype::float32), 0, s.device, s.preferences, s.preferences) {
    const Shape shape(c);
    for (const Numbers& numbers : {some(shape.numel, 7), some(shape.numel, 13), some(shape.affine, 5),
                                   some(shape.affine, 3), Numbers(c.groups, 1.0)})
      in_.emplace_back(Dtype::float32, numbers);
    counts_ = {shape.numel, shape.maps, shape.maps, shape.affine, shape.affine, c.groups};
    for (const int64_t count : counts_) out_.emplace_back(Dtype::float32, count);
  }

  // What it returns, nothing where it fails. sums: whether another launch makes the parameters' gradients.
  std::optional<std::vector<Numbers>> operator()(Direction direction, bool sums = true) {
    const bool forward = direction == Direction::forward;
    for (size_t i = 0; i < out_.size(); ++i)
      if (forward || (i != mean && i != rstd)) out_[i] = Tensor(Dtype::float32, counts_[i]);
    try {
      return forward ? run_forward() : run_backward(sums);
    } catch (const std::exception&) {
      return std::nullopt;
    }
  }

 private:
  enum { x, dy, weight, bias, sigma };                  // of in_
  enum { result, mean, rstd, dweight, dbias, dsigma };  // of out_

  template <class Tensors>
  void fill(Tensors& tensors) {
    tensors.x = in_[x].data();
    tensors.weight = in_[weight].parameter();
    tensors.bias = in_[bias].parameter();
    tensors.sigma = in_[sigma].parameter();
    tensors.mean = out_[mean].data();
    tensors.rstd = out_[rstd].data();
  }
  std::optional<std::vector<Numbers>> run_forward() {
    ForwardCall call;
    fill(call.tensors);
    call.tensors.y = out_[result].data();
    calls_.forward(call);
    return std::vector<Numbers>{out_[result].numbers(), out_[mean].numbers(), out_[rstd].numbers()};
  }
  std::optional<std::vector<Numbers>> run_backward(bool sums) {
    const auto scratch = std::make_unique<unsigned char[]>(calls_.scratch_bytes(Direction::backward));
    BackwardCall call;
    fill(call.tensors);
    call.tensors.dy = in_[dy].data();
    call.tensors.dx = out_[result].data();
    if (sums) {
      call.tensors.dweight = out_[dweight].parameter();
      call.tensors.dbias = out_[dbias].parameter();
      call.tensors.dsigma = out_[dsigma].parameter();
    }
    call.place.scratch = scratch.get();
    calls_.backward(call);
    std::vector<Numbers> all{out_[result].numbers()};
    for (const int i : {dweight, dbias, dsigma})
      if (sums) all.push_back(out_[i].numbers());
    return all;
  }

  cuda::Calls calls_;
  std::vector<int64_t> counts_;
  std::vector<Tensor> in_, out_;
};

// What threads of the system are needed to see (test_races.cpp), for fibers do not get so far apart: shuffles keep a
// warp together but forward over planes, and what backward waits for at first has come by then. And where there are two
// rings, what the copying warp waits for at one has mostly been waited for at the other.
bool is_spare(const Case& c, Direction direction, bool twice, Word word, int warp) {
  const bool forward = direction == Direction::forward, computes = warp < kComputeWarps;
  return (word == Word::sync_warps && (c.channels_last || !forward)) ||
         (word == Word::wait && !forward && (c.channels_last || computes)) ||
         (word == Word::wait && twice && warp == kWarps - 1);
}

void check_words(const Case& c, bool twice) {
  Share share;
  for (const Direction direction : {Direction::forward, Direction::backward}) {
    if (twice && direction == Direction::forward) continue;
    const std::string name = c.name + (direction == Direction::forward ? " forward" : " backward");
    Call call(c, setting_of(c, direction, twice));
    emulation::schedule(0);
    emulation::leave_out(Word::barrier, -1, -1);
    call(Direction::forward);  // the maps
    call(direction, false);
    std::vector<std::vector<int>> met(kWords);
    for (int word = 0; word < kWords; ++word)
      for (int warp = 0; warp < kWarps; ++warp) met[word].push_back(emulation::met(static_cast<Word>(word), warp));
    const auto expected = call(direction);
    check(expected.has_value(), name);
    for (unsigned order = 1; order < kOrders; order += 20) {
      emulation::schedule(order);
      check(call(direction) == expected, name + ", order " + std::to_string(order));
    }
    for (int word = 0; word < kWords; ++word)
      for (int warp = 0; warp < kWarps; ++warp) {
        if (is_spare(c, direction, twice, static_cast<Word>(word), warp)) continue;
        // The slots of the second ring are not given back to anybody at last.
        const int last = twice && static_cast<Word>(word) == Word::arrive && warp < kComputeWarps ? 2 * kAgainSlots : 0;
        for (int index = 0; index < met[word][warp] - last; ++index) {
          if (!share.takes()) continue;
          bool found = false;
          for (unsigned order = 0; order < kOrders && !found; ++order) {
            emulation::schedule(order);
            emulation::leave_out(static_cast<Word>(word), 0, index, warp);
            found = call(direction) != expected;
          }
          check(found, name + " without " + kWordNames[word] + " " + std::to_string(index) + " of warp " +
                           std::to_string(warp));
        }
      }
  }
}

}  // namespace

int main() {
  const std::optional<Axes> small = window({1, 3, 3}), all = window({1, 17, 17});
  check_words({"planes", false, false, false, 3, 12, 1, {1, 12, 8}, small, small, true}, false);
  check_words({"planes, dy twice", false, false, false, 3, 48, 1, {1, 12, 8}, small, small, true}, true);
  check_words({"pixels", true, false, false, 4, 12, 1, {1, 16, 8}, small, small, true}, false);
  check_words({"pixels in groups", true, false, false, 3, 8, 2, {1, 16, 8}, small, small, true}, false);
  check_words({"whole planes", false, false, false, 3, 12, 1, {1, 12, 8}, all, all, true}, false);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
