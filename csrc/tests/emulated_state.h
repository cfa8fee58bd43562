// What the emulated device keeps of a launch's threads and blocks.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulated_barriers.h"
#include "emulated_device.h"
#include "emulated_threads.h"

namespace divnorm::cuda::emulation {

struct Asynchronous;  // ordered_copies.cpp

struct Block {
  Block(int64_t number, int threads, int shared_bytes);
  // Where bytes of its shared memory begin in there; an error where they do not lie in it.
  int64_t offset_of(const void* address, int64_t bytes) const;
  // Where accesses are reported: the calling thread has written there; something has that is no thread; bytes that a
  // thread has written without a fence behind it are an error.
  void by_thread(const void* address, int64_t bytes);
  void not_by_threads(const void* address, int64_t bytes);
  void check_fenced(const void* address, int64_t bytes) const;

  static constexpr int kWarpBarriers = 16;
  int64_t number;
  int bytes, unfinished;  // threads that have not ended
  std::unique_ptr<unsigned char[]> shared;
  Meeting barrier;
  std::vector<Meeting> warps;
  std::vector<double> exchange;  // of shuffles, two rounds deep
  std::array<WarpBarrier, kWarpBarriers> some_warps;
  std::vector<std::unique_ptr<Mbarrier>> mbarriers;
  std::vector<const Thread*> threads;
  Edges ends;  // of the threads
  std::shared_ptr<Asynchronous> asynchronous;

 private:
  struct Written {
    const Thread* by = nullptr;
    int fences = 0;  // its, until then
  };
  std::vector<Written> written_;  // of each two bytes
};

struct Cluster {
  Cluster(int64_t first, int blocks, int threads, int shared_bytes);
  Meeting barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

// Copies out of shared memory that a thread waits for together.
struct Group {
  int unread = 0, unwritten = 0;
  Edges read, written;
};

// The phase that a thread has last waited for at an mbarrier, and whether it waits for every one, as far as is known.
struct Waited {
  int64_t phase;
  bool every;
};

struct Thread {
  Thread(const device::Self& self, Cluster& cluster, bool early) : self(self), cluster(&cluster), early(early) {}
  Block& block() const { return *cluster->blocks[self.rank]; }
  int warp() const { return self.thread / device::kWarp; }

  device::Self self;
  Cluster* cluster;
  bool early;                    // has to wait for the launch before
  bool started = false;          // the other blocks of its cluster have too
  bool wrote_elsewhere = false;  // to another block since the last barrier that waits for that
  int shuffles = 0;
  std::array<int, kWords> met = {};  // words, left out or not
  Recorded recorded = {};            // where costs are kept

  // Asynchronous copies see what it wrote before its last fence. fenced: since it last came to a barrier; handed: so
  // had all who came to the last barrier that it has waited at, but for those that count bytes.
  std::atomic<int> fences = 0;
  bool fenced = false, handed = false;
  std::vector<Mbarrier*> unpublished;
  std::map<const Mbarrier*, Waited> waited;
  std::deque<Group> groups = std::deque<Group>(1);  // the last one is not committed yet
  Sleepers copies;
};

std::string name_of(const Thread& thread);

// Whether this word of the calling thread is left out, of the launch under way.
bool left_out(Word word);
void count_launch();

// Counts an access to global memory; site: the instruction, as far as two can be told apart.
void count(const void* address, int bytes, bool write, uintptr_t site);
// One to another block's shared memory that counts at a barrier there.
void count_store(const void* address, int bytes, uintptr_t site);

// A barrier has been come to, or the end; at: which one, of several of a kind.
void end_phase(Ending ending, int64_t at = 0);

}  // namespace divnorm::cuda::emulation
