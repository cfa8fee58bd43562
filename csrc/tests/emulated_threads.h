// How the threads of a kernel run together on the emulated device: as fibers that take turns, or as threads of the
// system where races are looked for (DIVNORM_EMULATED_THREADS). Whoever waits sleeps, so that it is seen when nobody
// can go on.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

namespace divnorm::cuda::emulation {

struct Thread;

#ifdef DIVNORM_EMULATED_THREADS
extern thread_local Thread* current;
#else
extern Thread* current;  // whose turn it is
#endif

// An error of the kernel's. run() throws it; where threads are those of the system the process ends.
[[noreturn]] void fail(const std::string& error);

// While it lives no other thread changes what the emulation keeps. ThreadSanitizer takes no order from that, and does
// not look at what happens under it: what the device puts in order, Edges do (emulated_barriers.h).
class Locked {
 public:
  Locked();
  ~Locked();
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;
};

using Holds = std::function<bool()>;
using Place = std::function<std::string()>;

// Threads that wait for the same. Under a lock.
class Sleepers {
 public:
  // The calling thread sleeps until `holds`, and looks again whenever wake() is called; place() says where it waits.
  template <class H, class P>
  void wait(H&& holds, P&& place) {
    if (!holds()) sleep(std::ref(holds), std::ref(place));
  }
  void wake();

 private:
  void sleep(const Holds& holds, const Place& place);
#ifdef DIVNORM_EMULATED_THREADS
  std::condition_variable condition_;
  int asleep_ = 0, woken_ = 0;
#else
  std::vector<int> asleep_;
#endif
};

// Who waits where, for the report.
struct Asleep {
  const Thread* thread;
  const Place* at;
};
std::string deadlock(const std::vector<Asleep>& asleep);

// Here others may go on first; with a seed some do.
void give_way();

#ifndef DIVNORM_EMULATED_THREADS
int random_below(int count);
#endif

// Runs the kernel once for every thread, to the end. late(): does something that threads may wait for once none of them
// can go on, and earlier now and then with a seed; whether there was anything to do.
void run_together(std::deque<Thread>& threads, const std::function<void()>& kernel, const std::function<bool()>& late);

}  // namespace divnorm::cuda::emulation
