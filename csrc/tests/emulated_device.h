// The kernels' words (cuda/device.h) on the CPU: a thread of a kernel is a fiber, or a thread of the system where races
// are looked for (DIVNORM_EMULATED_THREADS). The blocks of a cluster run together, clusters one after the other. Every
// access to global memory is counted, for the tensor that it falls into.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include "costs.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

namespace divnorm::cuda::device {

constexpr int kWarp = 32;

// What a thread is told of itself; the emulation sets it before the thread goes on.
struct Self {
  int thread, threads, rank;
  int64_t block;
};
const Self& self();

inline int thread() { return self().thread; }
inline int threads() { return self().threads; }
inline int64_t block() { return self().block; }

unsigned char* shared_memory();
void sync_block();
void sync_warp();
void sync_cluster(int size);
void sync_cluster_shared(int size);  // an error where this thread may have written to another block's shared memory
unsigned char* in_block(unsigned char* address, int rank, bool to_write);
double shuffle_xor(double value, int mask);

template <class V>
V* in_block(V* address, int rank) {
  auto* bytes = reinterpret_cast<unsigned char*>(const_cast<std::remove_const_t<V>*>(address));
  return reinterpret_cast<V*>(in_block(bytes, rank, !std::is_const_v<V>));
}
inline float shuffle_xor(float value, int mask) {
  return static_cast<float>(shuffle_xor(static_cast<double>(value), mask));
}

void count_read(const void* address, int bytes);
void count_write(const void* address, int bytes);

struct AsUsual {};
struct Again {
  explicit Again(bool) {}
};
struct NoMore {};

template <class V>
V load(const V* address) {
  count_read(address, sizeof(V));
  return *address;
}
template <class V, class Cached = AsUsual>
void store(V* address, V value, Cached = {}) {
  count_write(address, sizeof(V));
  *address = value;
}
template <class V>
void store_at_once(V* address, V value) {
  store(address, value);
}
template <int Bytes, class Cached>
void copy_async(void* shared, const void* global, Cached) {
  count_read(global, Bytes);
  std::memcpy(shared, global, Bytes);
}
inline void copies_done() {}
inline void forget() {}

int take_ticket(int* counter);
void signal(int* counter);
void wait_for(int* counter, int count);  // of work that must be done by then
int arrive(int* counter);
void signal(uint64_t* flag, uint64_t number);
void wait_for_all(uint64_t* flags, int64_t count, uint64_t number);
void wait_for_launch_before();
inline void let_next_begin() {}

template <class A>
A reciprocal(A number) {
  return 1 / number;
}

template <class A>
A inverse_root(A number) {
  return 1 / std::sqrt(number);
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
float float_of_half(uint16_t bits);
uint16_t half_of(float value);
uint16_t bfloat16_of(float value);
inline void floats_of_halves(uint32_t word, float& first, float& second) {
  first = float_of_half(static_cast<uint16_t>(word & 0xffff));
  second = float_of_half(static_cast<uint16_t>(word >> 16));
}
inline uint32_t halves_of(float first, float second) { return half_of(first) | uint32_t{half_of(second)} << 16; }
inline uint32_t bfloat16s_of(float first, float second) {
  return bfloat16_of(first) | uint32_t{bfloat16_of(second)} << 16;
}

}  // namespace divnorm::cuda::device

namespace divnorm::cuda::emulation {

// The blocks of the largest cluster that the device can hold, and how many clusters it can hold at once.
inline int largest_cluster = 16, most_clusters = 1 << 16;

// Runs a grid of clusters of `cluster` blocks. early: its threads may not touch global memory before they have waited
// for the launch before. together: the grid's last blocks, which may wait for any: their clusters run at once.
void run(int64_t blocks, int cluster, int threads, int shared_bytes, bool early, const std::function<void()>& kernel,
         int64_t together = 0);

// Counts bytes read and written from here on: of each tensor that is watched, and of everything else together.
struct Traffic {
  int64_t read = 0, written = 0;
};
void watch(const void* address, int64_t bytes);
Traffic traffic_of(const void* address);
Traffic traffic_elsewhere();
void forget_traffic();

// Addresses in shared memory that were looked up through the cluster to be read: in the block itself, and in others.
struct Lookups {
  int64_t own = 0, others = 0;
};
Lookups lookups();

// From here on the first blocks of every launch are run, whole clusters, and their costs kept; 0: all are, and none.
// Accesses to shared memory are among them in builds that report those (touched.cpp).
void keep_costs(int64_t blocks);
const Costs& costs();
void touched(const void* address, int bytes, bool write, uintptr_t site);

// Words that order what threads do, or move bytes without them.
enum class Word {
  barrier,  // of a block or a cluster
  init,
  inits_done,
  arrive,
  expect,
  wait,
  copy_in,
  copy_out,
  commit,
  copies_out_read,
  copies_out_done,
  fence_async,
  store_async,
  sync_warps,  // and of one
  arrive_warps,
  signal,       // to a block that waits for all
  wait_for_all  // by that
};
constexpr const char* kWordNames[] = {
    "barrier",     "init",       "inits_done",   "arrive",          "expect",          "wait",
    "copy_in",     "copy_out",   "commit",       "copies_out_read", "copies_out_done", "fence_async",
    "store_async", "sync_warps", "arrive_warps", "signal",          "wait_for_all"};
constexpr int kWords = sizeof kWordNames / sizeof *kWordNames;

// Of the launch of this number from here on, the word of this number among those of its kind is left out, counted by
// every thread from the start of its kernel; by the threads of one warp of every block, or by all (-1). Launch -1: none
// is. How many the threads of a warp have met, the one with the most, in the last launch.
void leave_out(Word word, int launch, int index, int warp = -1);
int met(Word word, int warp);

// The order in which threads take turns and what they do not wait for is done: 0, thread after thread, and as late as
// can be; else at random, by this seed. Nothing where they are threads of the system.
void schedule(unsigned seed);

}  // namespace divnorm::cuda::emulation
