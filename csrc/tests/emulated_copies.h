// What a thread of the emulated device sets going and does not wait for: bulk copies and stores to other blocks. With
// fibers they come late and in any order (late_copies.cpp). With threads of the system they are done at once, by an
// agent of whom ThreadSanitizer knows what the device promises of it (ordered_copies.cpp). All of it under a lock.
#pragma once

#include "emulated_state.h"

namespace divnorm::cuda::emulation {

// Before a block's threads start.
void prepare_copies(Block& block);

void start_copy_in(void* shared, const void* global, int bytes, Mbarrier& barrier);
// Counts in the calling thread's last group.
void start_copy_out(void* global, const void* shared, int bytes);
// To an address of block `to`, at whose barrier it counts.
void start_store(Block& to, void* address, const void* value, int bytes, Mbarrier& barrier);

// Does one of what is under way; whether there was any.
bool complete_one();
// All threads of this block have ended, and nobody may reach its shared memory from here on.
void end_memory(const Block& block);
// What is still on its way to global memory when the last thread has ended.
void complete_all();
// Of a launch that has failed.
void forget_copies();

}  // namespace divnorm::cuda::emulation
