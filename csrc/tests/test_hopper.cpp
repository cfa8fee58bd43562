// Hopper's words on the emulated device: a kernel with all of them is right in whatever order its threads go on, and is
// seen to be wrong without any one of them.
#include <algorithm>
#include <cmath>
#include <exception>
#include <vector>

#include "check.h"
#include "outcome.h"
#include "ring_kernel.h"
#include "share.h"

namespace {

using namespace divnorm::tests;
using divnorm::cuda::emulation::kWordNames;
using divnorm::cuda::emulation::Word;
namespace emulation = divnorm::cuda::emulation;

#ifdef DIVNORM_EMULATED_THREADS
constexpr int kChunks = 4, kClusters = 1;  // a second each
#else
constexpr int kChunks = 5, kClusters = 2;
#endif
constexpr int kBlocks = kClusters * kRingBlocks;
constexpr int kRingWords = static_cast<int>(Word::signal);  // but for those between clusters, which are the last

bool ring_is_right() {
  const int numbers = kBlocks * kChunks * kComputeThreads;
  std::vector<float> x(numbers), expected(numbers), y(numbers, NAN), sum(kBlocks, NAN), expected_sum(kBlocks, 0);
  for (int i = 0; i < numbers; ++i) x[i] = static_cast<float>(i * 7 % 101);
  const auto at = [](int block, int chunk) { return (block * kChunks + chunk) * kComputeThreads; };
  for (int block = 0; block < kBlocks; ++block)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float total = 0;
      for (int other = block / kRingBlocks * kRingBlocks, end = other + kRingBlocks; other < end; ++other)
        for (int i = 0; i < kComputeThreads; ++i) total += x[at(other, chunk) + i];
      for (int i = at(block, chunk); i < at(block, chunk + 1); ++i) expected_sum[block] += expected[i] = x[i] + total;
    }
  const RingArguments args{x.data(), y.data(), sum.data(), kChunks};
  emulation::run(kBlocks, kRingBlocks, kRingThreads, sizeof(Ring), false, [&] { ring_kernel(args); });
  return y == expected && sum == expected_sum;
}

// Whether the kernel is right, or what is said of it.
#ifdef DIVNORM_EMULATED_THREADS
constexpr unsigned kOrders = 1;  // ThreadSanitizer sees what might happen in others
bool goes_wrong(Word word, int launch, int index, int warp, unsigned) {
  return outcome_without(word, launch, index, warp, [] {
           if (!ring_is_right()) std::exit(EXIT_FAILURE);
         }) != 0;
}
#else
constexpr unsigned kOrders = 60;
bool goes_wrong(Word word, int launch, int index, int warp, unsigned order) {
  emulation::schedule(order);
  emulation::leave_out(word, launch, index, warp);
  try {
    return !ring_is_right();
  } catch (const std::exception& error) {
    if (launch < 0) std::printf("%s\n", error.what());
    return true;
  }
}
#endif

void check_ring() {
  check(ring_is_right(), "the ring");
  std::vector<std::vector<int>> met(kRingWords);
  for (int word = 0; word < kRingWords; ++word) {
    int all = 0;
    for (int warp = 0; warp < kRingWarps; ++warp) {
      met[word].push_back(emulation::met(static_cast<Word>(word), warp));
      all += met[word].back();
    }
    check(all > 0, std::string("the ring has ") + kWordNames[word]);
  }
  for (unsigned order = 0; order < kOrders; ++order)
    check(!goes_wrong(Word::barrier, -1, -1, -1, order), "the ring in order " + std::to_string(order));
  Share share;
  for (int word = 0; word < kRingWords; ++word) {
    int caught = 0, all = 0;
    unsigned latest = 0;
    for (int warp = 0; warp < kRingWarps; ++warp)
      for (int index = 0; index < met[word][warp]; ++index) {
        if (!share.takes()) continue;
        unsigned order = 0;
        while (order < kOrders && !goes_wrong(static_cast<Word>(word), 0, index, warp, order)) ++order;
        caught += order < kOrders;
        ++all;
        if (order < kOrders) latest = std::max(latest, order);
        check(order < kOrders, std::string("the ring without ") + kWordNames[word] + " " + std::to_string(index) +
                                   " of warp " + std::to_string(warp));
      }
    std::printf("%s: %d of %d that are left out are caught, in order %u at the latest\n", kWordNames[word], caught, all,
                latest);
  }
}

}  // namespace

int main() {
  check_ring();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
