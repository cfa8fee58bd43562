// A kernel with all of Hopper's words, for tests: chunks of numbers come into a ring of slots in shared memory, the sum
// of what a cluster's blocks hold of a chunk is added to each of its numbers in place, and they go out again.
#pragma once

#include "../cuda/hopper.h"

namespace divnorm::tests {

namespace device = cuda::device;

constexpr int kRingBlocks = 2, kRingSlots = 2;
constexpr int kComputeWarps = 2, kProducer = kComputeWarps, kStorer = kComputeWarps + 1, kRingWarps = kStorer + 1;
constexpr int kComputeThreads = kComputeWarps * device::kWarp, kRingThreads = kRingWarps * device::kWarp;

struct Ring {
  float slots[kRingSlots][kComputeThreads];  // a chunk each
  device::Barrier full[kRingSlots], empty[kRingSlots];
  device::Barrier exchanged, taken;  // the sums of all blocks have come; all blocks have read them
  float partial[kComputeWarps], sums[kRingBlocks];
};

// Of every block: `chunks` chunks of x and y one after the other, and the sum of its part of y.
struct RingArguments {
  const float* x;
  float *y, *sum;
  int chunks;
};

constexpr int kChunkBytes = kComputeThreads * sizeof(float);
constexpr int kComputing = 1, kComputed = 2;  // barriers of warps; of the latter one for each slot

__device__ inline int parity_of(int chunk) { return chunk / kRingSlots & 1; }

__device__ inline void produce(const RingArguments& args, Ring& ring) {
  constexpr int kHalf = kChunkBytes / 2;
  for (int chunk = 0; chunk < args.chunks; ++chunk) {
    const int slot = chunk % kRingSlots;
    const float* from = args.x + (device::block() * args.chunks + chunk) * kComputeThreads;
    if (chunk >= kRingSlots) device::wait(&ring.empty[slot], parity_of(chunk - kRingSlots));
    device::expect(&ring.full[slot], kHalf);
    device::copy_bulk(ring.slots[slot], from, kHalf, &ring.full[slot]);
    device::arrive_expecting(&ring.full[slot], kHalf);
    device::copy_bulk(ring.slots[slot] + kComputeThreads / 2, from + kComputeThreads / 2, kHalf, &ring.full[slot],
                      device::NoMore());
  }
}

__device__ inline void compute(const RingArguments& args, Ring& ring) {
  const int thread = device::thread(), rank = static_cast<int>(device::block() % kRingBlocks);
  for (int chunk = 0; chunk < args.chunks; ++chunk) {
    const int slot = chunk % kRingSlots;
    device::wait(&ring.full[slot], parity_of(chunk));
    float sum = ring.slots[slot][thread];
    for (int mask = device::kWarp / 2; mask > 0; mask /= 2) sum += device::shuffle_xor(sum, mask);
    if (thread % device::kWarp == 0) ring.partial[thread / device::kWarp] = sum;
    device::sync_warps(kComputing, kComputeThreads);
    if (thread == 0) {
      if (chunk > 0) device::wait_for_cluster(&ring.taken, (chunk - 1) & 1);
      device::arrive_expecting(&ring.exchanged, sizeof ring.sums);
      for (int to = 0; to < kRingBlocks; ++to)
        device::store_async(&ring.sums[rank], ring.partial[0] + ring.partial[1], to, &ring.exchanged);
    }
    device::wait_for_cluster(&ring.exchanged, chunk & 1);
    ring.slots[slot][thread] += ring.sums[0] + ring.sums[1];
    device::fence_async();
    device::arrive_warps(kComputed + slot, kComputeThreads + device::kWarp);
    if (chunk + 1 < args.chunks) device::sync_warps(kComputing, kComputeThreads);
    if (thread == 0)
      for (int to = 0; to < kRingBlocks; ++to) device::arrive_in_block(&ring.taken, to);
  }
  if (thread == 0) device::wait_for_cluster(&ring.taken, (args.chunks - 1) & 1);  // no block ends before they have come
}

__device__ inline void store_chunks(const RingArguments& args, Ring& ring) {
  const bool first = device::thread() % device::kWarp == 0;
  float* y = args.y + device::block() * args.chunks * kComputeThreads;
  for (int chunk = 0; chunk < args.chunks; ++chunk) {
    const int slot = chunk % kRingSlots, before = chunk - 1;
    device::sync_warps(kComputed + slot, kComputeThreads + device::kWarp);
    if (!first) continue;
    device::copy_bulk_out(y + chunk * kComputeThreads, ring.slots[slot], kChunkBytes);
    device::commit_copies_out();
    if (before < 0 || before + kRingSlots >= args.chunks) continue;
    device::copies_out_read<1>();
    device::arrive(&ring.empty[before % kRingSlots]);
  }
  if (!first) return;
  device::copies_out_done<0>();
  float sum = 0;
  for (int i = 0; i < args.chunks * kComputeThreads; ++i) sum += device::load(y + i);
  device::store(args.sum + device::block(), sum);
}

__global__ inline void ring_kernel(const __grid_constant__ RingArguments args) {
  Ring& ring = *reinterpret_cast<Ring*>(device::shared_memory());
  if (device::thread() == 0) {
    for (int slot = 0; slot < kRingSlots; ++slot) {
      device::init(&ring.full[slot], 1);
      device::init(&ring.empty[slot], 1);
    }
    device::init(&ring.exchanged, 1);
    device::init(&ring.taken, kRingBlocks);
    device::inits_done();
  }
  device::sync_cluster(kRingBlocks);
  const int warp = device::thread() / device::kWarp;
  if (warp < kComputeWarps)
    compute(args, ring);
  else if (warp == kStorer)
    store_chunks(args, ring);
  else if (device::thread() % device::kWarp == 0)
    produce(args, ring);
}

}  // namespace divnorm::tests
