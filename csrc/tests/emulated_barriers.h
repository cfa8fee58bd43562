// The barriers of the emulated device: those at which all threads of a warp, a block or a cluster wait, those of some
// of a block's warps, and mbarriers. All of it under a lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulated_threads.h"

namespace divnorm::cuda::emulation {

// Who takes a phase's edge has seen what happened before those who gave it: the order that the device promises, and all
// that ThreadSanitizer is told of. Two in turns: the one that leaves a phase late has not seen who has come again.
class Edges {
 public:
  void give(int64_t phase) { of_phase_[phase & 1].fetch_add(1, std::memory_order_release); }
  void take(int64_t phase) const { of_phase_[phase & 1].load(std::memory_order_acquire); }

 private:
  std::atomic<int> of_phase_[2] = {0, 0};
};

// As many as take part arrive before anybody goes on.
class Meeting {
 public:
  // The phase that this is an arrival to. fenced: what the thread wrote before is seen by asynchronous copies; stays:
  // it will wait.
  int64_t arrive(int count, bool fenced, bool stays = true);
  // Whether those had fenced who handed something over in that phase: all who came, or those who did not stay, where
  // there are any; name and number: for reports.
  bool wait(int64_t phase, const char* name, int number = 0);

 private:
  int64_t phase_ = 0;
  int count_ = 0, arrived_ = 0;
  struct Fenced {
    bool all = true, left = true, any_left = false;
  } fenced_, last_fenced_;
  Edges edges_;
  Sleepers sleepers_;
};

// A barrier of some warps, by its number.
class WarpBarrier {
 public:
  int64_t arrive(int id, int thread, int threads, bool fenced, bool stays);
  bool wait(int64_t phase, int id);

 private:
  int count_ = 0;
  std::vector<int64_t> next_;  // of each thread that has come: the first phase that it may come to again
  Meeting meeting_;
};

// An mbarrier (PTX ISA, "mbarrier"). A phase ends once nobody and no byte is missing.
class Mbarrier {
 public:
  Mbarrier(const Thread* maker, int64_t offset, int arrivals);

  void publish() { published_ = true; }
  bool usable_by(const Thread* thread) const { return published_ || thread == maker_; }
  int64_t offset() const { return offset_; }
  int64_t phase() const { return phase_; }

  // Bytes that the phase under way waits for.
  void expect(int64_t bytes);
  // An arrival; of_others: by another block.
  void arrive(bool fenced, bool of_others);
  // Bytes of a copy or a store that was issued in `phase`.
  void complete(int64_t bytes, int64_t phase, bool of_others);
  // Whoever counts here gives its edge first.
  Edges& edges() { return edges_; }

  // What the phase waited for had: bytes; arrivals or bytes of other blocks; fences of all who arrived.
  struct Ended {
    int64_t phase = -1;
    bool bytes = false, of_others = false, fenced = false;
  };
  Ended wait(int parity);

 private:
  void settle();
  std::string missing() const;

  const Thread* maker_;
  int64_t offset_;
  int arrivals_, pending_;
  bool published_ = false;
  int64_t phase_ = 0, bytes_ = 0;
  Ended now_, last_;
  Edges edges_;
  Sleepers sleepers_;
};

}  // namespace divnorm::cuda::emulation
