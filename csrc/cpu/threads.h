// Threads in teams: a team takes whole jobs, its members share the work inside one. With many samples a team is one
// thread and never waits; with few, all threads work on the same sample.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

#include "simd.h"

namespace divnorm::DIVNORM_ISA {

class Barrier {
 public:
  void wait(int size) {
    const int phase = __atomic_load_n(&phase_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&phase_, __ATOMIC_ACQUIRE) == phase; ++spins) pause(spins);
  }

 private:
  static void pause(int spins) {
    if (spins < kSpins) {
#if defined(__x86_64__)
      _mm_pause();
#endif
      return;
    }
#if defined(__unix__) || defined(__APPLE__)
    sched_yield();  // more threads than processors: let the late one run
#endif
  }

  static constexpr int kSpins = 4096;
  alignas(64) int arrived_ = 0;
  alignas(64) int phase_ = 0;
};

// Zeroed or raw memory for the length of a call.
template <class A>
class Buffer {
 public:
  Buffer(int64_t count, bool zeroed = false) {
    const size_t bytes = static_cast<size_t>(count > 0 ? count : 1) * sizeof(A);  // no more: a sanitizer sees its end
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
    data_ = static_cast<A*>(memory);
    if (zeroed) __builtin_memset(data_, 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* data() const { return data_; }

 private:
  A* data_;
};

struct Member {
  int thread, team, teams, rank, size;
  Barrier* barrier;

  void sync() const {
    if (size > 1) barrier->wait(size);
  }

  // body(from, to) on this member's part of begin..end
  template <class Body>
  void share(int64_t begin, int64_t end, Body&& body) const {
    if (size == 1) {
      if (begin < end) body(begin, end);
      return;
    }
    const int64_t count = end - begin;
    const int64_t from = begin + count * rank / size, to = begin + count * (rank + 1) / size;
    if (from < to) body(from, to);
  }
};

class Threads {
 public:
  // At most `threads`, and where a job cannot be shared no more than there are jobs.
  Threads(int threads, int64_t jobs, bool shareable) : jobs_(jobs < 1 ? 1 : jobs), shareable_(shareable) {
    threads_ = threads < 1 ? 1 : threads;
    if (!shareable && threads_ > jobs_) threads_ = static_cast<int>(jobs_);
    teams_ = choose_teams(threads_, threads_);
    barriers_ = new Barrier[teams_];
  }
  ~Threads() { delete[] barriers_; }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const { return threads_; }
  int teams() const { return teams_; }

  template <class Body>
  void run(Body&& body) {
#if defined(_OPENMP)
    if (threads_ > 1) {
#pragma omp parallel num_threads(threads_)
      {
        const int running = omp_get_num_threads();
        const int teams = running == threads_ ? teams_ : choose_teams(running, teams_);
        body(member(omp_get_thread_num(), running, teams));
      }
      return;
    }
#endif
    body(Member{0, 0, 1, 0, 1, barriers_});
  }

 private:
  // The largest number of teams whose busiest one takes at most a tenth longer than the best split.
  int choose_teams(int threads, int most) const {
    const int limit = most < threads ? most : threads;
    const int teams_at_most = jobs_ < limit ? static_cast<int>(jobs_) : limit;
    if (!shareable_) return teams_at_most;
    const auto time = [&](int teams) {
      return static_cast<double>((jobs_ + teams - 1) / teams) / static_cast<double>(threads / teams);
    };
    double best = time(1);
    for (int teams = 2; teams <= teams_at_most; ++teams) best = time(teams) < best ? time(teams) : best;
    int chosen = teams_at_most;
    while (chosen > 1 && time(chosen) > 1.1 * best) --chosen;
    return chosen;
  }

  Member member(int thread, int running, int teams) const {
    const int team = static_cast<int>((static_cast<int64_t>(thread) * teams) / running);
    const int first = (team * running + teams - 1) / teams;
    const int next = ((team + 1) * running + teams - 1) / teams;
    return Member{thread, team, teams, thread - first, next - first, barriers_ + team};
  }

  int threads_ = 1, teams_ = 1;
  int64_t jobs_;
  bool shareable_;
  Barrier* barriers_ = nullptr;
};

}  // namespace divnorm::DIVNORM_ISA
