// What the compiler calls before every access to memory that it was asked to instrument (-fsanitize=thread), answered
// here in place of ThreadSanitizer's library: accesses to shared memory are counted. Functions are not inlined there,
// so that a pack of numbers is accessed as it stands in the source, and keep their frames.
#include <cstddef>

#include "emulated_device.h"

namespace {

// The access that is reported and the call of the function that it is in, for those that access packs serve many loops:
// mixed so that few others give the same.
__attribute__((always_inline)) inline uintptr_t site() {
  constexpr uintptr_t kOdd = 0x9e3779b97f4a7c15;
  return reinterpret_cast<uintptr_t>(__builtin_return_address(0)) +
         reinterpret_cast<uintptr_t>(__builtin_return_address(1)) * kOdd;
}

// As a GPU moves it, sixteen bytes at most at a time.
void touch(const void* address, size_t bytes, bool write, uintptr_t site) {
  constexpr size_t kMost = 16;
  for (size_t at = 0; at < bytes; at += kMost)
    divnorm::cuda::emulation::touched(static_cast<const char*>(address) + at,
                                      static_cast<int>(bytes - at < kMost ? bytes - at : kMost), write,
                                      site + at / kMost);
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void __tsan_read1(void* at) { touch(at, 1, false, site()); }
void __tsan_read2(void* at) { touch(at, 2, false, site()); }
void __tsan_read4(void* at) { touch(at, 4, false, site()); }
void __tsan_read8(void* at) { touch(at, 8, false, site()); }
void __tsan_read16(void* at) { touch(at, 16, false, site()); }
void __tsan_unaligned_read2(void* at) { touch(at, 2, false, site()); }
void __tsan_unaligned_read4(void* at) { touch(at, 4, false, site()); }
void __tsan_unaligned_read8(void* at) { touch(at, 8, false, site()); }
void __tsan_unaligned_read16(void* at) { touch(at, 16, false, site()); }
void __tsan_read_range(void* at, size_t bytes) { touch(at, bytes, false, site()); }
void __tsan_write1(void* at) { touch(at, 1, true, site()); }
void __tsan_write2(void* at) { touch(at, 2, true, site()); }
void __tsan_write4(void* at) { touch(at, 4, true, site()); }
void __tsan_write8(void* at) { touch(at, 8, true, site()); }
void __tsan_write16(void* at) { touch(at, 16, true, site()); }
void __tsan_unaligned_write2(void* at) { touch(at, 2, true, site()); }
void __tsan_unaligned_write4(void* at) { touch(at, 4, true, site()); }
void __tsan_unaligned_write8(void* at) { touch(at, 8, true, site()); }
void __tsan_unaligned_write16(void* at) { touch(at, 16, true, site()); }
void __tsan_write_range(void* at, size_t bytes) { touch(at, bytes, true, site()); }
}
