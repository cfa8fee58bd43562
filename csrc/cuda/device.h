// The words the kernels are written in. On a GPU they are CUDA's; for the tests csrc/tests/emulated_device.h gives the
// same words on the CPU, where every access to global memory is counted.
#pragma once

#include <cstdint>
#include <cstring>

#include "../problem.h"
#include "boxes.h"

#if defined(DIVNORM_EMULATED)
#include "../tests/emulated_device.h"
#else

#include <cuda_runtime.h>

namespace divnorm::cuda::device {

constexpr int kWarp = 32;
constexpr unsigned kEveryLane = 0xffffffffu;
constexpr unsigned kRest = 40;  // nanoseconds, of who waits

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int threads() { return static_cast<int>(blockDim.x); }
__device__ inline int64_t block() { return blockIdx.x; }

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(kBoxAlignment) unsigned char memory[];
  return memory;
}

__device__ inline void sync_block() { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }

// Waits for every thread of a cluster of `size` blocks and makes what they wrote visible.
__device__ inline void sync_cluster(int size) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (size > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// The same where blocks have written to their own shared memory alone: writes to global memory are not waited for, by
// compilers that can say so. .sync_restrict is new in PTX ISA 8.6 (its release notes), which nvcc 12.7 is the first to
// write; it orders what is restricted to it and no more (PTX ISA, "membar / fence"). By the letter that leaves open
// whether a block may overwrite what others have read of it. On the machine it may: what a thread reads elsewhere goes
// into what it computes or stores before it arrives here, so the value has come back by then.
__device__ inline void sync_cluster_shared(int size) {
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1207
  sync_cluster(size);
#else
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (size > 1) {
    asm volatile(
        "fence.release.sync_restrict::shared::cta.cluster;\n"
        "barrier.cluster.arrive.relaxed.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;\n"
        "fence.acquire.sync_restrict::shared::cluster.cluster;" ::
            : "memory");
    return;
  }
#endif
  __syncthreads();
#endif
}

// Where `address`, in this block's shared memory, lies in that of block `rank` of the cluster; const, to read it alone.
template <class V>
__device__ inline V* in_block(V* address, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(address)), "r"(rank));
  return reinterpret_cast<V*>(there);
#else
  return address;
#endif
}

template <class A>
__device__ inline A shuffle_xor(A value, int mask) {
  return __shfl_xor_sync(kEveryLane, value, mask);
}

// How long the second-level cache should keep what an access touches: as usual, longer than other lines because it will
// be read again, or shorter because it is done with. The latter two hold a policy of the hardware's.
struct AsUsual {};
class Again {
 public:
  // Where all of that cannot stay, as usual.
  __device__ explicit Again(bool can_stay) {
    uint64_t usual;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(usual));
    if (!can_stay) policy = usual;
  }
  uint64_t policy;
};
class NoMore {
 public:
  __device__ NoMore() { asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy)); }
  uint64_t policy;
};

// What has been read before is read again from here on, where registers are too few to keep it.
__device__ inline void forget() { asm volatile("" ::: "memory"); }

// Global memory.
template <class V>
__device__ inline V load(const V* address) {
  return *address;
}
template <class V>
__device__ inline void store(V* address, V value, AsUsual = {}) {
  *address = value;
}
template <class V>
__device__ inline void store(V* address, V value, NoMore cached) {
  constexpr int kWords = sizeof(V) / 4;
  if constexpr (kWords == 0) {
    *address = value;
  } else {
    uint32_t words[kWords];
    memcpy(words, &value, sizeof value);
    if constexpr (kWords == 4)
      asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(address), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3]), "l"(cached.policy)
                   : "memory");
    else if constexpr (kWords == 2)
      asm volatile("st.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;" ::"l"(address), "r"(words[0]), "r"(words[1]),
                   "l"(cached.policy)
                   : "memory");
    else
      asm volatile("st.global.L2::cache_hint.b32 [%0], %1, %2;" ::"l"(address), "r"(words[0]), "l"(cached.policy)
                   : "memory");
  }
}
// In one access, also where the value has been put together from several, which the compiler stores one by one.
template <class V>
__device__ inline void store_at_once(V* address, V value) {
  constexpr int kWords = sizeof(V) / 4;
  if constexpr (kWords < 2) {
    *address = value;
  } else {
    uint32_t words[kWords];
    memcpy(words, &value, sizeof value);
    if constexpr (kWords == 4)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]),
                   "r"(words[2]), "r"(words[3])
                   : "memory");
    else
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  }
}

// Global to shared memory without a register in between; complete after copies_done() and a barrier.
template <int Bytes>
__device__ inline void copy_async(void* shared, const void* global, AsUsual) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(Bytes) : "memory");
}
template <int Bytes, class Cached>
__device__ inline void copy_async(void* shared, const void* global, Cached cached) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "l"(cached.policy)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(Bytes),
                 "l"(cached.policy)
                 : "memory");
}
__device__ inline void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The next number of a counter, by one thread.
__device__ inline int take_ticket(int* counter) { return atomicAdd(counter, 1); }

// One thread says that what its block wrote before the last barrier is there; another waits until `count` have.
__device__ inline void signal(int* counter) {
  asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
// Looks without an acquire, which would empty the first-level cache that its neighbours work from, and rests between.
__device__ inline void wait_for(int* counter, int count) {
  int seen;
  while (true) {
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    if (seen >= count) break;
    __nanosleep(kRest);
  }
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// As signal, to one block that waits for all: by a number that it alone looks for and sets to zero again.
__device__ inline void signal(uint64_t* flag, uint64_t number) {
  asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(number) : "memory");
}
// The block's threads share the flags; what was signalled is seen by each after a barrier.
__device__ inline void wait_for_all(uint64_t* flags, int64_t count, uint64_t number) {
  for (int64_t i = thread(); i < count; i += threads()) {
    uint64_t seen;
    while (true) {
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flags + i) : "memory");
      if (seen == number) break;
      __nanosleep(kRest);
    }
    flags[i] = 0;
  }
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// As signal(counter); how many had said so before, whose writes are seen.
__device__ inline int arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Lets the launch that follows begin once all blocks of this one have come here, to wait beside them for its end.
__device__ inline void let_next_begin() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the launch before this one has ended and what it wrote is there; of one that was not started early, that
// is so from the start (CUDA programming guide, "Programmatic Dependent Launch").
__device__ inline void wait_for_launch_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of a number from 1 to 2, to half a unit in the last place: a division has a way for every other.
__device__ inline double reciprocal(double number) { return 1 / number; }
__device__ inline float reciprocal(float number) {
  float near;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(number));
  return near + near * (1 - number * near);
}

__device__ inline double inverse_root(double number) { return ::rsqrt(number); }
__device__ inline float inverse_root(float number) { return ::rsqrtf(number); }

__device__ inline float from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline float float_of_half(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
// Two numbers of a half type in a word, the first in its low half: one instruction rounds both.
__device__ inline void floats_of_halves(uint32_t word, float& first, float& second) {
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(first), "=f"(second)
      : "r"(word));
}
__device__ inline uint32_t halves_of(float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
__device__ inline uint32_t bfloat16s_of(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
__device__ inline uint16_t half_of(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ inline uint16_t bfloat16_of(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

}  // namespace divnorm::cuda::device
#endif
