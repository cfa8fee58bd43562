#include "costs.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <tuple>

namespace divnorm::cuda::emulation {
namespace {

constexpr int kWarp = 32, kBanks = 32, kBankBytes = 4, kSectorBytes = 32;

int64_t sectors_of(const std::vector<Access>& lanes) {
  std::set<uintptr_t> sectors;
  for (const Access& lane : lanes)
    for (uintptr_t at = lane.address / kSectorBytes; at <= (lane.address + lane.bytes - 1) / kSectorBytes; ++at)
      sectors.insert(at);
  return static_cast<int64_t>(sectors.size());
}

// What a warp's threads do at one instruction for the same time in a phase, they do together.
using Together = std::map<std::tuple<int, const void*, int>, std::vector<Access>>;

Together together(const std::vector<Access>* threads) {
  Together found;
  for (int lane = 0; lane < kWarp; ++lane) {
    std::map<std::pair<int, const void*>, int> times;
    for (const Access& access : threads[lane])
      found[{access.phase, access.site, times[{access.phase, access.site}]++}].push_back(access);
  }
  return found;
}

}  // namespace

int64_t wavefronts_of(const std::vector<Access>& lanes) {
  int most = kBankBytes;
  for (const Access& lane : lanes) most = std::max(most, lane.bytes);
  const size_t served = kWarp * kBankBytes / most;
  int64_t wavefronts = 0;
  for (size_t first = 0; first < lanes.size(); first += served) {
    std::array<std::set<uintptr_t>, kBanks> words;
    for (size_t i = first; i < std::min(first + served, lanes.size()); ++i)
      for (uintptr_t at = lanes[i].address / kBankBytes; at <= (lanes[i].address + lanes[i].bytes - 1) / kBankBytes;
           ++at)
        words[at % kBanks].insert(at);
    size_t deepest = 1;
    for (const auto& bank : words) deepest = std::max(deepest, bank.size());
    wavefronts += static_cast<int64_t>(deepest);
  }
  return wavefronts;
}

Conflicts conflicts_in(const std::vector<std::vector<std::vector<Access>>>& blocks,
                       const std::vector<std::vector<Ending>>& endings) {
  // When an access happens: after how many of the cluster's barriers, and of its full ones.
  struct Time {
    int barriers = 0, full = 0;
    bool write = false;
  };
  const auto times_of = [&](size_t block) {
    std::vector<Time> found;  // of each phase
    Time now;
    for (const Ending ending : endings[block]) {
      found.push_back(now);
      now.barriers += ending == Ending::cluster || ending == Ending::cluster_shared;
      now.full += ending == Ending::cluster;
    }
    return found;
  };
  std::map<uintptr_t, std::vector<Time>> by_others;
  for (size_t block = 0; block < blocks.size(); ++block) {
    const std::vector<Time> times = times_of(block);
    for (const auto& thread : blocks[block])
      for (const Access& access : thread)
        if (access.space == Space::others) {
          const Time& time = times[access.phase];
          by_others[access.address].push_back({time.barriers, time.full, access.write});
        }
  }
  Conflicts found;
  for (size_t block = 0; block < blocks.size(); ++block) {
    const std::vector<Time> times = times_of(block);
    for (const auto& thread : blocks[block])
      for (const Access& access : thread) {
        if (access.space != Space::shared) continue;
        const Time& own = times[access.phase];
        const auto end = by_others.lower_bound(access.address + access.bytes);
        for (auto at = by_others.lower_bound(access.address); at != end; ++at) {
          bool race = false, unordered = false;
          for (const Time& other : at->second) {
            race = race || ((access.write || other.write) && own.barriers == other.barriers);
            unordered =
                unordered || (access.write && !other.write && own.barriers > other.barriers && own.full == other.full);
          }
          found.races += race;
          found.unordered += unordered;
        }
      }
  }
  return found;
}

void add_phases(Phase known, const std::vector<std::vector<Access>>& threads, const std::vector<Ending>& endings,
                const std::vector<int64_t>& shuffles, std::vector<Phase>& to) {
  const size_t first = to.size();
  for (size_t i = 0; i < endings.size(); ++i) {
    known.index = static_cast<int>(i);
    known.ending = endings[i];
    known.shuffles = shuffles[i];
    to.push_back(known);
  }
  for (const auto& thread : threads) {
    std::vector<int> accesses(endings.size()), others(endings.size());
    for (const Access& access : thread) {
      ++accesses[access.phase];
      others[access.phase] += access.space == Space::others;
    }
    for (size_t i = 0; i < endings.size(); ++i) {
      Phase& phase = to[first + i];
      phase.at_work += accesses[i] > 0;
      phase.done += accesses[i];
      phase.depth = std::max<int64_t>(phase.depth, accesses[i]);
      phase.depth_others = std::max(phase.depth_others, others[i]);
    }
  }
  for (size_t warp = 0; warp < threads.size(); warp += kWarp)
    for (const auto& [key, lanes] : together(threads.data() + warp)) {
      Phase& phase = to[first + std::get<0>(key)];
      switch (lanes.front().space) {
        case Space::shared:
          ++phase.shared;
          phase.wavefronts += wavefronts_of(lanes);
          for (const Access& lane : lanes) phase.shared_bytes += lane.bytes;
          break;
        case Space::others: ++phase.others; break;
        case Space::global:
          ++phase.global;
          phase.sectors += sectors_of(lanes);
          for (const Access& lane : lanes) (lane.write ? phase.written : phase.read) += lane.bytes;
          break;
      }
    }
}

}  // namespace divnorm::cuda::emulation
