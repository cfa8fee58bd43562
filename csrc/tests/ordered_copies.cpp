// At once, by agents: what ThreadSanitizer takes for a thread that comes after the one who issued the operation, and
// that others come after only where they wait for it. Asynchronous copies see ordinary writes behind fences alone, so
// that shared memory is read by a second agent too, which comes after nothing but fences and other such copies.
#include <sanitizer/tsan_interface.h>

#include <cstring>

#include "emulated_copies.h"

// Of ThreadSanitizer's library.
extern "C" {
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
}

namespace divnorm::cuda::emulation {
namespace {

std::atomic<int> all_done = 0;  // who ends the launch comes after all agents

[[gnu::noinline]] void give(std::atomic<int>& edge) { edge.fetch_add(1, std::memory_order_release); }
[[gnu::noinline]] void take(const std::atomic<int>& edge) { edge.load(std::memory_order_acquire); }
[[gnu::noinline]] void give(Edges& edges, int64_t phase) { edges.give(phase); }

}  // namespace

// Comes after what the thread has done that made it. The calling thread acts as it; what it does then is not looked at,
// for it is on the stack of that thread, but for what it calls: ranges of bytes, and edges.
class Agent {
 public:
  Agent() : fiber_(__tsan_create_fiber(0)) {}
  ~Agent() { __tsan_destroy_fiber(fiber_); }
  Agent(const Agent&) = delete;
  Agent& operator=(const Agent&) = delete;
  template <class Act>
  [[gnu::no_sanitize_thread]] void act(const Act& act) {
    void* self = __tsan_get_current_fiber();
    // The other way of switching would come after all whose agents have been at the same address, too.
    __tsan_switch_to_fiber(fiber_, __tsan_switch_to_fiber_no_sync);
    act();
    give(all_done);
    __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
  }

 private:
  void* fiber_;
};

// Of a block: made before its threads start.
struct Asynchronous {
  Agent agent;
  std::atomic<int> written = 0;  // by copies into its shared memory
};

void prepare_copies(Block& block) { block.asynchronous = std::make_shared<Asynchronous>(); }

void start_copy_in(void* shared, const void* global, int bytes, Mbarrier& barrier) {
  std::memcpy(shared, global, bytes);
  Edges* edges = &barrier.edges();
  std::atomic<int>* written = &current->block().asynchronous->written;
  const int64_t phase = barrier.phase();
  Agent().act([=]() __attribute__((no_sanitize_thread)) {
    __tsan_read_range(const_cast<void*>(global), bytes);
    __tsan_write_range(shared, bytes);
    give(*written);
    give(*edges, phase);
  });
  barrier.complete(bytes, phase, false);
}

void start_copy_out(void* global, const void* shared, int bytes) {
  std::memcpy(global, shared, bytes);
  Asynchronous& asynchronous = *current->block().asynchronous;
  Group* group = &current->groups.back();
  auto* from = const_cast<void*>(shared);
  Agent().act([=]() __attribute__((no_sanitize_thread)) {
    __tsan_read_range(from, bytes);
    give(group->read, 0);
    __tsan_write_range(global, bytes);
    give(group->written, 0);
  });
  const Thread* const* threads = current->block().threads.data();
  const size_t count = current->block().threads.size();
  const std::atomic<int>* written = &asynchronous.written;
  asynchronous.agent.act([=]() __attribute__((no_sanitize_thread)) {
    for (size_t i = 0; i < count; ++i) take(threads[i]->fences);
    take(*written);
    __tsan_read_range(from, bytes);
    give(group->read, 0);
  });
}

void start_store(Block& to, void* address, const void* value, int bytes, Mbarrier& barrier) {
  std::memcpy(address, value, bytes);
  Edges* edges = &barrier.edges();
  const int64_t phase = barrier.phase();
  Agent().act([=]() __attribute__((no_sanitize_thread)) {
    __tsan_write_range(address, bytes);
    give(*edges, phase);
  });
  barrier.complete(bytes, phase, &to != &current->block());
}

void end_memory(const Block& block) {
  unsigned char* shared = block.shared.get();
  const int bytes = block.bytes;
  Agent().act([=]() __attribute__((no_sanitize_thread)) { __tsan_write_range(shared, bytes); });
}

bool complete_one() { return false; }
void complete_all() { take(all_done); }
void forget_copies() {}

}  // namespace divnorm::cuda::emulation
