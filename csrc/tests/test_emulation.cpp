// The emulated device itself: what it refuses of Hopper's words, what it says then, and what it counts of a kernel
// whose warps have different tasks.
#include <functional>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/launch.h"
#include "check.h"
#include "ring_kernel.h"

namespace {

using namespace divnorm::tests;
using divnorm::cuda::described;
using divnorm::cuda::TensorMap;
using divnorm::cuda::device::Barrier;
namespace emulation = divnorm::cuda::emulation;

constexpr int kBytes = 1024, kChunk = 64;

// Of a block's shared memory.
struct Memory {
  unsigned char chunk[kChunk];
  Barrier barrier;
};

alignas(16) float from[kChunk], to[kChunk];

Memory& memory() { return *reinterpret_cast<Memory*>(device::shared_memory()); }

void make_barrier(int arrivals) {
  if (device::thread() == 0) {
    device::init(&memory().barrier, arrivals);
    device::inits_done();
  }
  device::sync_block();
}

// Of two rows of 32 bytes, in boxes of the half.
TensorMap map_of(const float* tensor) { return described(0, {tensor, 2, 32, {2, 16}}); }

// What is said of a kernel.
std::string said_of(int blocks, int warps, const std::function<void()>& kernel) {
  try {
    emulation::run(blocks, blocks, warps * device::kWarp, kBytes, false, kernel);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

struct Refused {
  const char* says;
  int blocks, warps;
  std::function<void()> kernel;
};

bool first() { return device::thread() == 0; }

const Refused kRefused[] = {
    {"there is no barrier at byte 64 of block 0", 1, 1, [] { device::arrive(&memory().barrier); }},
    {"there is no barrier at byte 64", 1, 1,
     [] {
       make_barrier(device::kWarp);
       memory().barrier.state = 0;
       device::arrive(&memory().barrier);
     }},
    {"nobody has said that the barrier is made", 1, 1,
     [] {
       if (first()) device::init(&memory().barrier, device::kWarp);
       device::sync_block();
       device::arrive(&memory().barrier);
     }},
    {"there already is a barrier", 1, 1,
     [] {
       if (first()) device::init(&memory().barrier, 1), device::init(&memory().barrier, 1);
     }},
    {"a barrier of 0 arrivals", 1, 1, [] { device::init(&memory().barrier, 0); }},
    {"a barrier at byte 65", 1, 1, [] { device::init(reinterpret_cast<Barrier*>(memory().chunk + 65), 1); }},
    {"not an address in this block's shared memory", 1, 1,
     [] { device::init(reinterpret_cast<Barrier*>(memory().chunk + kBytes - 4), 1); }},
    {"arrives once too often at the barrier at byte 64, whose phase 0 misses 0 of 1 arrivals and 64 bytes", 1, 1,
     [] {
       make_barrier(1);
       if (first()) device::arrive_expecting(&memory().barrier, kChunk);
       device::sync_block();
       device::arrive(&memory().barrier);
     }},
    {"more bytes than were expected", 1, 1,
     [] {
       make_barrier(1);
       if (!first()) return;
       device::arrive_expecting(&memory().barrier, kChunk / 2);
       device::copy_bulk(memory().chunk, from, kChunk, &memory().barrier);
       device::wait(&memory().barrier, 0);
     }},
    {"64 bytes that were issued in phase 0 come to the barrier at byte 64, whose phase 1", 1, 1,
     [] {
       make_barrier(1);
       if (!first()) return;
       device::copy_bulk(memory().chunk, from, kChunk, &memory().barrier);
       device::arrive(&memory().barrier);
       device::wait(&memory().barrier, 0);
       device::wait(&memory().barrier, 1);
     }},
    {"expects 1048576 bytes more", 1, 1,
     [] {
       make_barrier(1);
       device::expect(&memory().barrier, 1 << 20);
     }},
    {"nobody can go on:\n  thread 0 of block 0 and 31 more at the barrier at byte 64, whose phase 0 misses 1 of 2 "
     "arrivals and 16 bytes, in block 0",
     1, 1,
     [] {
       make_barrier(2);
       if (first()) device::arrive_expecting(&memory().barrier, 16);
       device::wait(&memory().barrier, 0);
     }},
    {"nobody can go on:\n  thread 0 of block 0 and 31 more at a barrier of the block, to which 32 of 64 have come", 1,
     2,
     [] {
       if (device::thread() < device::kWarp) device::sync_block();
     }},
    {"nobody can go on:\n  thread 1 of block 0 and 30 more at a shuffle, to which 31 of 32 have come", 1, 1,
     [] {
       if (!first()) device::shuffle_xor(1.0f, 1);
     }},
    {"waits for parity 2", 1, 1,
     [] {
       make_barrier(1);
       device::wait(&memory().barrier, 2);
     }},
    {"has waited for phase 0 last, and now for 3", 1, 1,
     [] {
       make_barrier(1);
       const auto arrive = [] {
         if (first()) device::arrive(&memory().barrier);
       };
       arrive();
       device::wait(&memory().barrier, 0);
       for (int i = 0; i < 3; ++i) arrive();
       device::wait(&memory().barrier, 1);
     }},
    {"waits for other blocks as if for its own", 2, 1,
     [] {
       make_barrier(1);
       device::sync_cluster(2);
       if (first() && device::block() == 1) device::arrive_in_block(&memory().barrier, 0);
       if (device::block() == 0) device::wait(&memory().barrier, 0);
       device::sync_cluster(2);
     }},
    {"block 1 may not have started yet", 2, 1,
     [] {
       make_barrier(1);
       device::arrive_in_block(&memory().barrier, 1);
     }},
    {"the blocks of the cluster may not have started yet", 2, 1, [] { device::in_block(&memory().barrier, 1); }},
    {"block 0 has ended", 2, 1,
     [] {
       make_barrier(1);
       device::sync_cluster(2);
       if (device::block() == 0) return;
       device::sync_block();  // and block 0 goes on
       device::arrive_in_block(&memory().barrier, 0);
     }},
    {"its block ends while there is a copy into bytes 0 to 63 of block 0 by thread 0 of block 0", 1, 1,
     [] {
       make_barrier(1);
       if (first()) device::copy_bulk(memory().chunk, from, kChunk, &memory().barrier);
     }},
    {"its block ends while there is a store into bytes 0 to 3 of block 0 by thread 0 of block 1", 2, 1,
     [] {
       make_barrier(1);
       device::sync_cluster(2);
       if (first() && device::block() == 1)
         device::store_async(reinterpret_cast<float*>(memory().chunk), 1.0f, 0, &memory().barrier);
       device::sync_cluster(2);
     }},
    {"a copy into bytes 0 to 63 of block 0 by thread 0 of block 0 while there is a copy out of bytes 32 to 47 of block "
     "0",
     1, 1,
     [] {
       make_barrier(1);
       device::fence_async();
       device::sync_block();
       if (!first()) return;
       device::copy_bulk_out(to, memory().chunk + 32, 16);
       device::copy_bulk(memory().chunk, from, kChunk, &memory().barrier);
     }},
    {"a copy into bytes 32 to 47 of block 0 by thread 0 of block 0 while there is a copy into bytes 0 to 63", 1, 1,
     [] {
       make_barrier(1);
       if (!first()) return;
       device::copy_bulk(memory().chunk, from, kChunk, &memory().barrier);
       device::copy_bulk(memory().chunk + 32, from, 16, &memory().barrier);
     }},
    {"a copy out of bytes 0 to 63 of block 0 by thread 0 of block 0 finds what was written too late", 1, 1,
     [] {
       device::fence_async();
       device::sync_block();
       if (!first()) return;
       device::copy_bulk_out(to, memory().chunk, kChunk);
       device::commit_copies_out();
       memory().chunk[5] = 0;
       device::copies_out_read<0>();
     }},
    {"no multiples of 16", 1, 1,
     [] {
       make_barrier(1);
       device::copy_bulk(memory().chunk, from, 8, &memory().barrier);
     }},
    {"no multiples of 16", 1, 1,
     [] {
       make_barrier(1);
       device::copy_bulk(memory().chunk + 8, from, 16, &memory().barrier);
     }},
    {"no multiples of 16", 1, 1, [] { device::copy_bulk_out(to + 1, memory().chunk, 16); }},
    {"a bulk copy of a barrier", 1, 1,
     [] {
       make_barrier(1);
       device::copy_bulk(memory().chunk, from, kChunk + 16, &memory().barrier);
     }},
    {"a copy of a box that nobody has described", 1, 1,
     [] {
       make_barrier(1);
       device::copy_box(memory().chunk, TensorMap(), {0, 0}, &memory().barrier);
     }},
    {"a box that does not lie in its tensor", 1, 1,
     [] {
       make_barrier(1);
       device::copy_box(memory().chunk, map_of(from), {0, 1}, &memory().barrier);
     }},
    {"a box that does not lie in its tensor", 1, 1,
     [] {
       make_barrier(1);
       device::copy_box(memory().chunk, map_of(from), {4, 0}, &memory().barrier);
     }},
    {"a box at an address that is no multiple of 128", 1, 1,
     [] {
       make_barrier(1);
       device::copy_box(memory().chunk + 16, map_of(from), {0, 0}, &memory().barrier);
     }},
    {"copies out what was not handed to it behind fences", 1, 1,
     [] { device::copy_box_out(map_of(to), {0, 0}, memory().chunk); }},
    {"a store of 8 bytes at byte 4", 1, 1,
     [] {
       make_barrier(1);
       device::store_async(reinterpret_cast<double*>(memory().chunk + 4), 1.0, 0, &memory().barrier);
     }},
    {"copies out what was not handed to it behind fences", 1, 1,
     [] {
       if (!first()) device::fence_async();
       device::sync_block();
       if (first()) device::copy_bulk_out(to, memory().chunk, kChunk);
     }},
    {"ends before it has committed", 1, 1,
     [] {
       device::fence_async();
       device::sync_block();
       if (first()) device::copy_bulk_out(to, memory().chunk, kChunk);
     }},
    {"ends before its copies out have read", 1, 1,
     [] {
       device::fence_async();
       device::sync_block();
       if (!first()) return;
       device::copy_bulk_out(to, memory().chunk, kChunk);
       device::commit_copies_out();
     }},
    {"barrier 1 is one of 32 threads, not of 64", 1, 2,
     [] {
       if (device::thread() < device::kWarp) device::sync_warps(1, device::kWarp);
       device::sync_block();
       device::arrive_warps(1, 2 * device::kWarp);
     }},
    {"comes to barrier 1 again before others have come once", 1, 2,
     [] { device::arrive_warps(1, 2 * device::kWarp), device::arrive_warps(1, 2 * device::kWarp); }},
    {"barrier 0 of 32 threads", 1, 1, [] { device::sync_warps(0, device::kWarp); }},
    {"barrier 1 of 48 threads", 1, 2, [] { device::sync_warps(1, 48); }},
};

void check_refusals() {
  for (const Refused& one : kRefused) {
    const std::string said = said_of(one.blocks, one.warps, one.kernel);
    check(said.find(one.says) != std::string::npos, std::string(one.says) + ", but: " + said);
  }
  std::printf("%zu errors are told\n", std::size(kRefused));
  try {
    emulation::run(1, 1, device::kWarp, kBytes, true, [] {
      make_barrier(1);
      device::copy_bulk(memory().chunk, from, kChunk, &memory().barrier);
    });
    check(false, "a copy before the launch before has ended");
  } catch (const std::logic_error&) {
  }
}

// A write behind its thread's fence, where accesses are reported: what other checks do not see.
void check_reported_writes() {
  const auto said = [](bool fence_behind) {
    return said_of(1, 1, [=] {
      if (!fence_behind) device::fence_async();
      emulation::touched(memory().chunk + device::thread(), 1, true, 0);
      if (fence_behind) device::fence_async();
      device::sync_block();
      if (!first()) return;
      device::copy_bulk_out(to, memory().chunk, kChunk);
      device::commit_copies_out();
      device::copies_out_read<0>();
    });
  };
  check(said(true).empty(), "a write and a fence: " + said(true));
  check(said(false).find("has written without a fence behind it") != std::string::npos, "a fence and a write");
}

// Warps with different tasks have phases of their own.
void check_costs() {
  constexpr int kChunks = 3, kNumbers = kRingBlocks * kChunks * kComputeThreads;
  std::vector<float> x(kNumbers), y(kNumbers), sum(kRingBlocks);
  const RingArguments args{x.data(), y.data(), sum.data(), kChunks};
  emulation::forget_traffic();
  emulation::watch(x.data(), kNumbers * sizeof(float));
  emulation::watch(y.data(), kNumbers * sizeof(float));
  emulation::keep_costs(kRingBlocks);
  emulation::run(kRingBlocks, kRingBlocks, kRingThreads, sizeof(Ring), false, [&] { ring_kernel(args); });
  std::map<int, std::vector<emulation::Phase>> of_warp;
  for (const emulation::Phase& phase : emulation::costs().phases)
    if (phase.block == 0) of_warp[phase.warp].push_back(phase);
  emulation::keep_costs(0);
  check(of_warp.size() == kRingWarps, "every warp of the ring comes to barriers of its own");
  const auto total = [&](int warp, int64_t emulation::Phase::* what) {
    int64_t all = 0;
    for (const emulation::Phase& phase : of_warp[warp]) all += phase.*what;
    return all;
  };
  check(total(kProducer, &emulation::Phase::read) == kChunks * kChunkBytes, "bytes that are copied in");
  check(total(kStorer, &emulation::Phase::written) == kChunks * kChunkBytes + 4, "bytes that are copied out");
  check(total(0, &emulation::Phase::others) == kChunks * kRingBlocks, "stores to blocks");
  check(total(1, &emulation::Phase::shuffles) == kChunks * 5, "shuffles");
  std::vector<emulation::Ending> endings, expected{emulation::Ending::cluster};
  for (const emulation::Phase& phase : of_warp[1]) endings.push_back(phase.ending);
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    using emulation::Ending;
    expected.insert(expected.end(), {Ending::mbarrier, Ending::warps, Ending::mbarrier});
    if (chunk + 1 < kChunks) expected.push_back(Ending::warps);
  }
  expected.push_back(emulation::Ending::kernel);
  check(endings == expected, "what a computing warp waits for");
  check(emulation::traffic_of(x.data()).read == kNumbers * 4 && emulation::traffic_of(y.data()).written == kNumbers * 4,
        "bytes of tensors");
  check(emulation::costs().conflicts.races == 0, "stores that count at a barrier do not race");
}

}  // namespace

int main() {
  check_refusals();
  check_reported_writes();
  check_costs();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
