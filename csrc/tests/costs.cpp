#include "costs.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <tuple>

namespace divnorm::cuda::emulation {
namespace {

constexpr int kWarp = 32, kBanks = 32, kBankBytes = 4;

uintptr_t last_of(const Access& access, int unit) { return (access.address + access.bytes - 1) / unit; }

// What a warp comes to: of its threads the one that comes to the most.
const std::vector<End>& ends_of(const Recorded* warp) {
  return std::max_element(
             warp, warp + kWarp,
             [](const Recorded& one, const Recorded& other) { return one.endings.size() < other.endings.size(); })
      ->endings;
}

// Which of its warp's phases a thread's are: the same but where others of the warp wait and it does not.
std::vector<int> phases_of(const Recorded& thread, const std::vector<End>& ends) {
  std::vector<int> found;
  size_t at = 0;
  for (const End& end : thread.endings) {
    const size_t same = std::find(ends.begin() + at, ends.end(), end) - ends.begin();
    found.push_back(static_cast<int>(std::min(same, ends.size() - 1)));
    at = std::min(same + 1, ends.size());
  }
  return found;
}

// What a warp's threads do at one instruction for the same time in a phase, they do together.
using Together = std::map<std::tuple<int, uintptr_t, Space, int>, std::vector<Access>>;

Together together(const Recorded* threads, const std::vector<End>& ends) {
  Together found;
  for (int lane = 0; lane < kWarp; ++lane) {
    const std::vector<int> phases = phases_of(threads[lane], ends);
    std::map<std::pair<int, uintptr_t>, int> times;
    for (const Access& access : threads[lane].accesses) {
      const int phase = phases[access.phase];
      found[{phase, access.site, access.space, times[{phase, access.site}]++}].push_back(access);
    }
  }
  return found;
}

// `threads` to a block.
Conflicts conflicts_in(const std::vector<Recorded>& all, size_t threads) {
  // Who accesses a word when: after how many of the cluster's barriers, and of its full ones.
  struct Use {
    size_t block;
    int barriers, full;
    bool own, write;
    bool operator<(const Use& other) const {
      return std::tie(block, barriers, full, own, write) <
             std::tie(other.block, other.barriers, other.full, other.own, other.write);
    }
  };
  const auto for_each = [&](auto&& use) {
    for (size_t i = 0; i < all.size(); ++i) {
      std::vector<std::pair<int, int>> times;  // of each phase
      int barriers = 0, full = 0;
      for (const End& end : all[i].endings) {
        times.emplace_back(barriers, full);
        barriers += end.ending == Ending::cluster || end.ending == Ending::cluster_shared;
        full += end.ending == Ending::cluster;
      }
      for (const Access& access : all[i].accesses) {
        if (access.space == Space::global || access.space == Space::counted) continue;
        const auto [after, after_full] = times[access.phase];
        const Use one{i / threads, after, after_full, access.space == Space::shared, access.write};
        for (uintptr_t word = access.address / kBankBytes; word <= last_of(access, kBankBytes); ++word) use(word, one);
      }
    }
  };
  std::map<uintptr_t, std::set<Use>> uses;  // of words that another block than their own accesses
  for_each([&](uintptr_t word, const Use& use) {
    if (!use.own) uses[word];
  });
  for_each([&](uintptr_t word, const Use& use) {
    if (const auto found = uses.find(word); found != uses.end()) found->second.insert(use);
  });
  Conflicts found;
  for (const auto& [word, all] : uses) {
    bool race = false, unordered = false;
    for (const Use& one : all)
      for (const Use& other : all) {
        if (one.block == other.block) continue;
        race = race || (one.write && one.barriers == other.barriers);
        unordered = unordered ||
                    (one.own && one.write && !other.write && one.barriers > other.barriers && one.full == other.full);
      }
    found.races += race;
    found.unordered += unordered;
  }
  return found;
}

// The phases of threads whose warps all come to the same.
void add_phases(Phase known, const Recorded* threads, std::vector<Phase>& to) {
  const std::vector<End>& ends = ends_of(threads);
  const size_t first = to.size(), phases = ends.size();
  for (size_t i = 0; i < phases; ++i) {
    known.index = static_cast<int>(i);
    known.ending = ends[i].ending;
    to.push_back(known);
  }
  for (int t = 0; t < known.threads; ++t) {
    const std::vector<int> own = phases_of(threads[t], ends);
    std::vector<int> accesses(phases), others(phases), shuffles(phases);
    for (const Access& access : threads[t].accesses) {
      ++accesses[own[access.phase]];
      others[own[access.phase]] += access.space == Space::others;
    }
    for (size_t i = 0; i < own.size(); ++i) shuffles[own[i]] += static_cast<int>(threads[t].shuffles[i]);
    for (size_t i = 0; i < phases; ++i) {
      Phase& phase = to[first + i];
      phase.at_work += accesses[i] > 0;
      phase.done += accesses[i];
      phase.depth = std::max<int64_t>(phase.depth, accesses[i]);
      phase.depth_others = std::max(phase.depth_others, others[i]);
      if (t % kWarp == 0) phase.shuffles += shuffles[i];
    }
  }
  for (int warp = 0; warp < known.threads; warp += kWarp)
    for (const auto& [key, lanes] : together(threads + warp, ends)) {
      Phase& phase = to[first + std::get<0>(key)];
      switch (lanes.front().space) {
        case Space::shared: {
          const Wavefronts found = wavefronts_of(lanes);
          ++phase.shared;
          phase.wavefronts += found.taken;
          phase.least += found.least;
          for (const Access& lane : lanes) phase.shared_bytes += lane.bytes;
          break;
        }
        case Space::others:
        case Space::counted: ++phase.others; break;
        case Space::global:
          ++phase.global;
          for (const Access& lane : lanes) (lane.write ? phase.written : phase.read) += lane.bytes;
          break;
      }
    }
}

}  // namespace

Wavefronts wavefronts_of(const std::vector<Access>& lanes) {
  int most = kBankBytes;
  for (const Access& lane : lanes) most = std::max(most, lane.bytes);
  const size_t served = kWarp * kBankBytes / most;
  Wavefronts found;
  for (size_t first = 0; first < lanes.size(); first += served) {
    std::array<std::set<uintptr_t>, kBanks> words;
    size_t all = 0, deepest = 1;
    for (size_t i = first; i < std::min(first + served, lanes.size()); ++i)
      for (uintptr_t at = lanes[i].address / kBankBytes; at <= last_of(lanes[i], kBankBytes); ++at)
        all += words[at % kBanks].insert(at).second;
    for (const auto& bank : words) deepest = std::max(deepest, bank.size());
    found.taken += static_cast<int64_t>(deepest);
    found.least += static_cast<int64_t>((all + kBanks - 1) / kBanks);
  }
  return found;
}

void Costs::add_cluster(int64_t first_block, const std::vector<Recorded>& threads) {
  Phase known;
  known.launch = static_cast<int>(launches.size()) - 1;
  const int each = launches.back().threads;
  for (int rank = 0; rank < launches.back().cluster; ++rank) {
    known.block = first_block + rank;
    const Recorded* of_block = threads.data() + static_cast<size_t>(rank) * each;
    for (int first = 0, end = 0; first < each; first = end) {
      for (end = first + kWarp; end < each && ends_of(of_block + end) == ends_of(of_block + first);) end += kWarp;
      known.warp = first / kWarp;
      known.threads = end - first;
      add_phases(known, of_block + first, phases);
    }
  }
  const Conflicts found = conflicts_in(threads, each);
  conflicts.races += found.races;
  conflicts.unordered += found.unordered;
}

}  // namespace divnorm::cuda::emulation
