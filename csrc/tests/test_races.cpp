// Under ThreadSanitizer, with a thread of the system for every thread of a kernel: no strategy has a race, and a kernel
// from which a barrier is taken away has one.
#include "channels_runner.h"
#include "cuda_runner.h"
#include "finish_runner.h"
#include "outcome.h"
#include "seam_runner.h"
#include "share.h"

namespace {

using namespace divnorm;
using namespace divnorm::tests;

using cuda::emulation::Word;

int outcome(int launch, int barrier, const std::function<void()>& body) {
  return outcome_without(Word::barrier, launch, barrier, -1, body);
}

int outcome(const Case& c, const Setting& setting, int launch, int index, Word word = Word::barrier) {
  return outcome_without(word, launch, index, -1, [&] {
    const Shape shape(c);
    const Numbers ones(shape.numel, 1.0), affine(shape.affine, 1.0), sigma(c.groups, 1.0);
    run(c, Dtype::float32, {ones, affine, affine, sigma, ones, affine}, ones, setting);
  });
}

// Of channel normalizations: around the sums over windows, and in blocks of two warps around those of the numbers that
// learn. Not behind a tile that is written: the next one is read by the same threads, unless its alignment differs.
void check_channels_for_races() {
  const auto cases = channel_cases();
  const struct {
    size_t which;
    std::vector<int> forward, backward;
  } all[] = {{0, {0, 1}, {0, 1, 2, 5, 6}}, {2, {0, 1, 2}, {0, 1, 2, 3, 4}}};
  for (const auto& one : all) {
    ChannelCase c = cases.at(one.which);
    c.problem.outer = 1;  // a tile, and threads to start for it
    c.problem.inner = 8;
    const Numbers ones(c.problem.numel(), 1.0);
    const auto outcome_without = [&](int launch, int barrier) {
      return outcome(launch, barrier, [&] { run_channels(c, Dtype::float32, ones, ones); });
    };
    check(outcome_without(-1, -1) == 0, c.name + ": a race");
    for (const bool forward : {true, false})
      for (const int barrier : forward ? one.forward : one.backward)
        check(outcome_without(forward ? 0 : 1, barrier) != 0,
              c.name + (forward ? ": forward" : ": backward") + " without barrier " + std::to_string(barrier));
  }
}

// Of the halves by themselves. In the sums: behind what is copied, in front of the next tile where one row goes on, and
// behind the sums of warps; of pixels around what threads leave of their channels too. In a half type, whose sums lie
// where other threads' numbers did.
void check_halves_for_races() {
  const std::optional<Axes> all = window({1, 17, 17});
  constexpr Activation tlu = Activation::tlu;
  const struct {
    Case c;
    std::vector<int> barriers;
  } cases[] = {
      {{"halves", false, false, false, 2, 4, 1, {1, 8, 9}, all, all, true, tlu, true}, {0, 1}},
      {{"halves, pixels", true, false, false, 1, 6, 1, {1, 8, 9}, all, all, true, tlu, true}, {1, 2, 3}},
      {{"halves over the batch", false, true, false, 2, 1, 1, {1, 8, 9}, all, all, true}, {1}},
  };
  constexpr int kSums = 5;  // its launch: forward's halves are two each, and l1 is one
  Setting two_pass = setting(0, 1 << 16);
  two_pass.device.multiprocessors = two_pass.preferences.items = 1;  // a block goes through all samples
  for (const auto& [c, barriers] : cases) {
    const auto outcome_without = [&, &c = c](int launch, int barrier) {
      return outcome(launch, barrier, [&] {
        const Shape shape(c);
        const Numbers ones(shape.numel, 1.0), affine(shape.affine, 1.0), sigma(c.groups, 1.0);
        run_halves(c, Dtype::bfloat16, {ones, affine, affine, sigma, ones, affine}, ones, two_pass);
      });
    };
    check(outcome_without(-1, -1) == 0, c.name + ": a race");
    for (const int barrier : barriers)
      check(outcome_without(kSums, barrier) != 0, c.name + ": sums without barrier " + std::to_string(barrier));
  }
}

// Of backward with sums inside: in front of the flags that a block shows to several, and behind those of others, which
// threads share; of channels that blocks have at different positions, around what each adds up first.
void check_sums_inside_for_races() {
  const std::optional<Axes> small = window({1, 3, 3});
  const struct {
    bool channels_last;
    int cluster;
    std::vector<int> barriers;
  } cases[] = {{false, 1, {13}}, {false, 2, {13, 14}}, {true, 1, {15}}, {true, 2, {13, 16, 17}}};
  for (const auto& [channels_last, cluster, barriers] : cases) {
    const Case c{"sums inside", channels_last, false, false, 2, 6, 1, {1, 5, 5}, small, small, true};
    Setting setting = *finishing(cluster == 1 ? "single-block" : "cluster-resident", c, Dtype::float32, cluster, true);
    setting.device.multiprocessors = 2 * cluster;  // two parts
    const std::string where = c.name + (channels_last ? ", pixels" : "") + ", clusters of " + std::to_string(cluster);
    check(outcome(c, setting, -1, -1) == 0, where + ": a race");
    for (const int barrier : barriers)
      check(outcome(c, setting, 1, barrier) != 0, where + ": without barrier " + std::to_string(barrier));
    check(outcome(c, setting, 1, 0, Word::wait_for_all) != 0, where + ": flags that nobody waits for");
  }
}

// Barriers by their number among those that a thread meets. A launch of a direction is followed by one that finishes
// its sums; `cleared`: one that clears counters goes before. Each of these barriers lies between a write and another
// thread's read of the same shared memory.
struct Removed {
  const char* strategy;
  int cleared;
  std::vector<int> forward, backward;
  std::vector<int> deviations;  // of forward with p = 1: before and behind the sums of |v|
  int later = 0;                // of pixels, how much later the last one is: what a thread fetches it has made itself
};

}  // namespace

int main() {
  const std::optional<Axes> none, small = window({1, 3, 3}), all_positions = window({1, 9, 9});
  constexpr Activation relu = Activation::relu, tlu = Activation::tlu;
  const Case all[] = {
      {"image", false, false, false, 2, 6, 1, {1, 5, 5}, small, small, true},
      {"image, pixels", true, false, false, 2, 6, 1, {1, 5, 5}, small, small, true},
      {"whole", false, false, false, 2, 6, 2, {1, 5, 5}, all_positions, all_positions, true},
      {"image, p = 1", false, false, false, 2, 6, 1, {1, 5, 5}, small, small, true, tlu, true, 1},
      {"pixels, p = 1", true, false, false, 2, 6, 1, {1, 5, 5}, none, small, true, relu, true, 1},
      {"whole, p = 1", false, false, false, 2, 6, 2, {1, 5, 5}, all_positions, all_positions, true, tlu, true, 1},
  };
  // Statistics before they are merged, the maps before a pass and before the result; in a single block before two
  // passes: there a thread's part of the result needs what it has summed itself.
  const Removed removed[] = {{"single-block", 0, {1, 3, 5}, {2, 4, 6}, {5, 6}},
                             {"cluster-resident", 0, {1, 3, 6}, {2, 4, 7}, {4, 6}, 1},
                             {"two-pass", 1, {2, 3, 4}, {2, 3, 4}, {3, 4}}};
  Share share;
  for (const Removed& one : removed)
    for (const Case& c : all) {
      if (!share.takes()) continue;
      const std::string where = std::string(one.strategy) + ": " + c.name;
      // The largest device: threads that share a position race, and only slices of channels make them share.
      auto setting = setting_for(one.strategy, c, Dtype::float32, 2, true);
      check(setting.has_value(), where + ": a setting");
      if (!setting) continue;
      setting->device.multiprocessors = 1;
      setting->device.cache_bytes = 1 << 20;
      for (const int window_rounds : {0, 4}) {  // by blocks, and window by window
        setting->preferences.window_rounds = window_rounds;
        check(outcome(c, *setting, -1, -1) == 0, where + ": a race");
      }
      if (c.whole() || !c.summation) continue;  // their barriers are others
      int caught = 0, barriers = 0;
      for (const bool forward : {true, false}) {
        const int launch = one.cleared + (forward ? 0 : 2 + one.cleared);
        std::vector<int> numbers = !forward ? one.backward : c.p == 1 ? one.deviations : one.forward;
        if (c.channels_last) numbers.back() += one.later;
        for (const int barrier : numbers) {
          const bool found = outcome(c, *setting, launch, barrier) != 0;
          caught += found;
          ++barriers;
          check(found, where + ": without barrier " + std::to_string(barrier) + " of launch " + std::to_string(launch));
        }
      }
      std::printf("%s: no race; %d of %d missing barriers are caught\n", where.c_str(), caught, barriers);
    }
  for (const Case& c : all) {  // what its barriers are for: test_pipeline.cpp
    if (c.p == 1) continue;
    Case aligned = c;
    aligned.channels = 8;
    aligned.batch = 3;
    const auto setting = setting_for("pipelined", aligned, Dtype::float32, 2);
    const std::string where = "pipelined: " + c.name;
    check(setting && outcome(aligned, *setting, -1, -1) == 0, where + ": a race");
    std::printf("%s: no race\n", where.c_str());
  }
  check_channels_for_races();
  check_halves_for_races();
  check_sums_inside_for_races();
  return failures == 0 ? 0 : 1;
}
