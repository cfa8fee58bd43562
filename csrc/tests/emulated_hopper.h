// Hopper's words (cuda/hopper.h) on the CPU, as hostile as the PTX ISA allows: copies and stores to other blocks come
// late and in any order, and what they are to write is no number until then.
#pragma once

#include <type_traits>

#include "../cuda/boxes.h"
#include "emulated_device.h"

namespace divnorm::cuda::device {

struct Barrier {
  uint64_t state;
};

void init(Barrier* barrier, int arrivals);
void inits_done();
void arrive(Barrier* barrier);
void arrive_expecting(Barrier* barrier, int bytes);
void expect(Barrier* barrier, int bytes);
void arrive_in_block(Barrier* barrier, int rank);
void wait(Barrier* barrier, int parity);
void wait_for_cluster(Barrier* barrier, int parity);

void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier);
void copy_bulk_out(void* global, const void* shared, int bytes);
template <class Cached>
void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier, Cached) {
  copy_bulk(shared, global, bytes, barrier);
}
template <class Cached>
void copy_bulk_out(void* global, const void* shared, int bytes, Cached) {
  copy_bulk_out(global, shared, bytes);
}
void copy_box(void* shared, const TensorMap& map, Corner at, Barrier* barrier);
template <class Cached>
void copy_box(void* shared, const TensorMap& map, Corner at, Barrier* barrier, Cached) {
  copy_box(shared, map, at, barrier);
}
void copy_box_out(const TensorMap& map, Corner at, const void* shared);
void commit_copies_out();
void wait_for_copies_out(int all_but, bool written);  // read, or written too
template <int N>
void copies_out_read() {
  wait_for_copies_out(N, false);
}
template <int N>
void copies_out_done() {
  wait_for_copies_out(N, true);
}
void fence_async();

void store_async(void* address, const void* value, int bytes, int rank, Barrier* barrier);
template <class V>
void store_async(V* address, V value, int rank, Barrier* barrier) {
  static_assert(std::is_trivially_copyable_v<V> && (sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16));
  store_async(address, &value, sizeof value, rank, barrier);
}

inline bool elected() { return thread() % kWarp == 0; }

void sync_warps(int id, int threads);
void arrive_warps(int id, int threads);

}  // namespace divnorm::cuda::device
