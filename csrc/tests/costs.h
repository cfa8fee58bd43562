// What costs time on a GPU beside bytes, of the kernels on the emulated device: accesses as warps make them, how the
// banks of shared memory serve them, barriers, and how the work lies among threads.
#pragma once

#include <cstdint>
#include <vector>

namespace divnorm::cuda::emulation {

// A block's own shared memory, that of others in its cluster, the same by a store that counts at a barrier there.
enum class Space { shared, others, counted, global };
enum class Ending { block, cluster, cluster_shared, kernel, warps, mbarrier };
// What a thread waits for at the end of a phase; at: the number of some warps' barrier, an mbarrier's place.
struct End {
  Ending ending = Ending::kernel;
  int64_t at = 0;
  bool operator==(const End& other) const { return ending == other.ending && at == other.at; }
};

// One access by one thread. site: the instruction, as far as two can be told apart.
struct Access {
  uintptr_t site = 0, address = 0;
  int bytes = 0, phase = 0;
  Space space = Space::shared;
  bool write = false;
};

// A launch, of which the first `run` blocks were run.
struct Launched {
  int64_t blocks = 0, run = 0;
  int cluster = 0, threads = 0, shared_bytes = 0;
};

// A stretch of the work between two barriers, of a block or, where its warps come to different ones, of those
// neighbours among them that come to the same.
struct Phase {
  int launch = 0;
  int64_t block = 0;
  int index = 0, warp = 0, threads = 0;  // the first of the warps
  Ending ending = Ending::kernel;
  int64_t shared = 0, others = 0, global = 0;  // accesses, a warp's threads together
  int64_t wavefronts = 0, least = 0;           // that its shared memory takes for `shared`, and would without conflicts
  int64_t shared_bytes = 0;                    // what that asks for
  int64_t read = 0, written = 0;               // bytes of global memory
  int64_t shuffles = 0;                        // of warps
  int at_work = 0;                             // threads that access memory
  int64_t done = 0, depth = 0;                 // accesses of all threads, and of the one with the most
  int depth_others = 0;                        // of the one with the most to other blocks
};

// Wavefronts that a warp's accesses to shared memory take: its 32 banks give four bytes each, to all who ask for the
// same; of wider accesses a half or a quarter of the warp is served at a time.
struct Wavefronts {
  int64_t taken = 0, least = 0;  // and without conflicts
};
Wavefronts wavefronts_of(const std::vector<Access>& lanes);

// Words of shared memory that two blocks of a cluster access, one of them to write. Races: between the same two of the
// cluster's barriers. Unordered: the owner writes what another block has read, with nothing in between but barriers for
// what blocks write to their own memory, which by the letter leave that order open (cuda/device.h).
struct Conflicts {
  int64_t races = 0, unordered = 0;
};

// What a thread of a kernel did, in its order. shuffles: in each phase.
struct Recorded {
  void end_phase(const End& end) {
    endings.push_back(end);
    shuffles.push_back(shuffles_of_phase);
    shuffles_of_phase = 0;
  }
  std::vector<Access> accesses;
  std::vector<End> endings;
  std::vector<int64_t> shuffles;
  int64_t shuffles_of_phase = 0;
};

// What launches did.
class Costs {
 public:
  void start(const Launched& launched) { launches.push_back(launched); }
  // The last launch's cluster whose first block this is: its threads, block by block.
  void add_cluster(int64_t first_block, const std::vector<Recorded>& threads);

  std::vector<Launched> launches;
  std::vector<Phase> phases;
  Conflicts conflicts;
};

}  // namespace divnorm::cuda::emulation
