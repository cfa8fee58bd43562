// What Hopper adds to the words of device.h: barriers in shared memory that count arrivals and bytes, copies that no
// thread waits for, stores to other blocks that count at a barrier there, and barriers of some of a block's warps. On
// older architectures they trap. csrc/tests/emulated_hopper.h gives the same words on the CPU.
#pragma once

#include <type_traits>

#include "device.h"

#if defined(DIVNORM_EMULATED)
#include "../tests/emulated_hopper.h"
#else

namespace divnorm::cuda::device {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif

// An mbarrier, in shared memory. A phase of it ends when as many have arrived as it was made for and all bytes that are
// expected have come; phases are told apart by their parity, the first one's is 0.
struct Barrier {
  uint64_t state;
};

__device__ inline uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}
// Where that lies in block `rank` of the cluster.
__device__ inline uint32_t shared_address(const void* address, int rank) {
  uint32_t there = 0;
  if constexpr (kHopper)
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(address)), "r"(rank));
  return there;
}

// By one thread, which then calls inits_done(); others see the barrier behind the next one of the block or cluster.
__device__ inline void init(Barrier* barrier, int arrivals) {
  if constexpr (kHopper)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  else
    __trap();
}
__device__ inline void inits_done() {
  if constexpr (kHopper)
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  else
    __trap();
}

// One arrival; what this thread did before is seen by who waits for the phase.
__device__ inline void arrive(Barrier* barrier) {
  if constexpr (kHopper)
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
  else
    __trap();
}
// The same, and the phase ends no sooner than `bytes` more have come.
__device__ inline void arrive_expecting(Barrier* barrier, int bytes) {
  if constexpr (kHopper)
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
  else
    __trap();
}
// The bytes alone, by a thread whose arrival is still to come.
__device__ inline void expect(Barrier* barrier, int bytes) {
  if constexpr (kHopper)
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
  else
    __trap();
}
// An arrival at block `rank`'s barrier of that address, where it is waited for by wait_for_cluster().
__device__ inline void arrive_in_block(Barrier* barrier, int rank) {
  if constexpr (kHopper)
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(shared_address(barrier, rank))
                 : "memory");
  else
    __trap();
}

// Until the phase of this parity has ended: the one under way, or the one before it.
__device__ inline void wait(Barrier* barrier, int parity) {
  if constexpr (kHopper) {
    uint32_t ended;
    do
      asm volatile(
          "{\n.reg .pred ended;\n"
          "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 ended, [%1], %2;\n"
          "selp.u32 %0, 1, 0, ended;\n}"
          : "=r"(ended)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    while (ended == 0);
  } else {
    __trap();
  }
}
// The same where other blocks arrive or store.
__device__ inline void wait_for_cluster(Barrier* barrier, int parity) {
  if constexpr (kHopper) {
    uint32_t ended;
    do
      asm volatile(
          "{\n.reg .pred ended;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n"
          "selp.u32 %0, 1, 0, ended;\n}"
          : "=r"(ended)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    while (ended == 0);
  } else {
    __trap();
  }
}

// Global to shared memory, by one thread; addresses and bytes are multiples of 16, and the bytes count at the barrier.
__device__ inline void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier, AsUsual = {}) {
  if constexpr (kHopper)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
  else
    __trap();
}
template <class Cached>
__device__ inline void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier, Cached cached) {
  if constexpr (kHopper)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared_address(shared)),
        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier)), "l"(cached.policy)
        : "memory");
  else
    __trap();
}

// The same of a box of the tensor that the map describes.
template <class Cached>
__device__ inline void copy_box(void* shared, const TensorMap& map, Corner at, Barrier* barrier, Cached cached) {
  if constexpr (!kHopper)
    __trap();
  else if constexpr (std::is_same_v<Cached, AsUsual>)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(shared)),
        "l"(&map), "r"(at.word), "r"(at.row), "r"(shared_address(barrier))
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
        "l"(&map), "r"(at.word), "r"(at.row), "r"(shared_address(barrier)), "l"(cached.policy)
        : "memory");
}

// Shared to global memory, by one thread. Whoever wrote the bytes has called fence_async() since, and this thread has
// passed a barrier behind that.
__device__ inline void copy_bulk_out(void* global, const void* shared, int bytes, AsUsual = {}) {
  if constexpr (kHopper)
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(global)),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
  else
    __trap();
}
template <class Cached>
__device__ inline void copy_bulk_out(void* global, const void* shared, int bytes, Cached cached) {
  if constexpr (kHopper)
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(
                     __cvta_generic_to_global(global)),
                 "r"(shared_address(shared)), "r"(bytes), "l"(cached.policy)
                 : "memory");
  else
    __trap();
}
__device__ inline void copy_box_out(const TensorMap& map, Corner at, const void* shared) {
  if constexpr (kHopper)
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
                 "r"(at.word), "r"(at.row), "r"(shared_address(shared))
                 : "memory");
  else
    __trap();
}
// The copies out that this thread has issued since the last time are a group.
__device__ inline void commit_copies_out() {
  if constexpr (kHopper)
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  else
    __trap();
}
// Until shared memory has been read for all groups of this thread but its last N, which it may then overwrite.
template <int N>
__device__ inline void copies_out_read() {
  if constexpr (kHopper)
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
  else
    __trap();
}
// Until global memory has been written too.
template <int N>
__device__ inline void copies_out_done() {
  if constexpr (kHopper)
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
  else
    __trap();
}

// What this thread has written to its block's shared memory is seen by copies out that are issued behind a barrier.
__device__ inline void fence_async() {
  if constexpr (kHopper)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  else
    __trap();
}

// To the same address in block `rank`, where the bytes of the value count at the barrier of that address.
template <class V>
__device__ inline void store_async(V* address, V value, int rank, Barrier* barrier) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  if constexpr (kHopper) {
    constexpr int kWords = sizeof(V) / 4;
    uint32_t words[kWords];
    memcpy(words, &value, sizeof value);
    const uint32_t to = shared_address(address, rank), counted = shared_address(barrier, rank);
    if constexpr (kWords == 4)
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
          "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(counted)
          : "memory");
    else if constexpr (kWords == 2)
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
                   "r"(words[0]), "r"(words[1]), "r"(counted)
                   : "memory");
    else
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                   "r"(words[0]), "r"(counted)
                   : "memory");
  } else {
    __trap();
  }
}

// By a warp together: whether this is the thread, always the same, that acts for it. What a bulk copy is given, the
// compiler then knows to be the same for the whole warp; of a thread that is alone it would find that out at every
// copy.
__device__ inline bool elected() {
  uint32_t one = 0;
  if constexpr (kHopper)
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(one));
  else
    __trap();
  return one != 0;
}

// A barrier of `threads` threads, whole warps, by its number, 1 to 15: one side of them goes on without waiting.
__device__ inline void sync_warps(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void arrive_warps(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace divnorm::cuda::device
#endif
