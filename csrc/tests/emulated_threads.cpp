// Threads as threads of the system, under ThreadSanitizer.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <utility>

#include "emulated_state.h"

// Of ThreadSanitizer's library.
extern "C" {
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace divnorm::cuda::emulation {

thread_local Thread* current = nullptr;

namespace {

// Locks and conditions that put nothing in order.
class Unordered {
 public:
  Unordered() { AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
  ~Unordered() { AnnotateIgnoreSyncEnd(__FILE__, __LINE__); }
};

std::mutex mutex;
std::vector<Asleep> sleeping;
size_t running = 0;  // who neither sleeps nor has ended

// By one who sleeps or has ended.
void check_others_go_on() {
  if (running == 0 && !sleeping.empty()) fail(deadlock(sleeping));
}

}  // namespace

void fail(const std::string& error) {
  std::fprintf(stderr, "%s: %s\n", current != nullptr ? name_of(*current).c_str() : "the launch", error.c_str());
  std::_Exit(EXIT_FAILURE);
}

Locked::Locked() {
  const Unordered unordered;
  mutex.lock();
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Locked::~Locked() {
  const Unordered unordered;
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  mutex.unlock();
}

void Sleepers::sleep(const Holds& holds, const Place& place) {
  const Unordered unordered;
  std::unique_lock<std::mutex> held(mutex, std::adopt_lock);
  do {
    sleeping.push_back({current, &place});
    ++asleep_;
    --running;
    check_others_go_on();
    condition_.wait(held, [this, before = woken_] { return woken_ != before; });
    sleeping.erase(std::find_if(sleeping.begin(), sleeping.end(), [&](const Asleep& one) { return one.at == &place; }));
  } while (!holds());
  held.release();
}
void Sleepers::wake() {
  const Unordered unordered;
  running += asleep_;
  asleep_ = 0;
  ++woken_;
  condition_.notify_all();
}

void run_together(std::deque<Thread>& threads, const std::function<void()>& kernel, const std::function<bool()>&) {
  std::vector<std::thread> all;
  running = threads.size();
  for (Thread& thread : threads)
    all.emplace_back([&thread, &kernel] {
      current = &thread;
      kernel();
      const Locked locked;
      --running;
      check_others_go_on();
    });
  for (std::thread& thread : all) thread.join();
}

// The system's, which no seed changes.
void give_way() {}
void schedule(unsigned) {}

}  // namespace divnorm::cuda::emulation
