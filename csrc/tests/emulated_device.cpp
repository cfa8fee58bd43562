#include "emulated_device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulated_copies.h"
#include "emulated_state.h"

namespace divnorm::cuda {

using emulation::current;
using emulation::Ending;
using emulation::fail;
using emulation::Locked;
using emulation::Word;

namespace {

bool keeping_costs = false;
int64_t most_blocks = 0;
emulation::Costs kept_costs;
std::array<std::vector<int>, emulation::kWords> words_met;  // in the last launch by each warp

struct Watched {
  int64_t bytes;
  emulation::Traffic traffic;
};
std::map<uintptr_t, Watched> watched;  // by address
emulation::Traffic elsewhere;
emulation::Lookups looked_up;
std::unique_ptr<emulation::Sleepers> waiting_for_flags;

void keep_access(emulation::Space space, const void* address, int bytes, uintptr_t site, bool write) {
  emulation::Recorded& recorded = current->recorded;
  recorded.accesses.push_back(
      {site, reinterpret_cast<uintptr_t>(address), bytes, static_cast<int>(recorded.endings.size()), space, write});
}

}  // namespace

namespace device {

const Self& self() { return current->self; }
unsigned char* shared_memory() { return current->block().shared.get(); }

static void meet(emulation::Meeting& meeting, int count, const char* name) {
  const Locked locked;
  const int64_t phase = meeting.arrive(count, std::exchange(current->fenced, false));
  current->handed = meeting.wait(phase, name);
}

void sync_block() {
  emulation::give_way();
  if (emulation::left_out(Word::barrier)) return;
  emulation::end_phase(Ending::block);
  meet(current->block().barrier, current->self.threads, "a barrier of the block");
}

static void wait_for_cluster(int size, Ending ending) {
  const int blocks = static_cast<int>(current->cluster->blocks.size());
  if (size != blocks) fail("not the cluster's size");
  emulation::give_way();
  current->started = true;
  if (emulation::left_out(Word::barrier)) return;
  emulation::end_phase(size == 1 ? Ending::block : ending);
  meet(current->cluster->barrier, blocks * current->self.threads, "a barrier of the cluster");
}
void sync_cluster(int size) {
  current->wrote_elsewhere = false;
  wait_for_cluster(size, Ending::cluster);
}
void sync_cluster_shared(int size) {
  if (current->wrote_elsewhere) fail("a barrier for what blocks write to their own memory");
  wait_for_cluster(size, Ending::cluster_shared);
}

unsigned char* in_block(unsigned char* address, int rank, bool to_write) {
  if (rank != current->self.rank && !current->started) fail("the blocks of the cluster may not have started yet");
  current->wrote_elsewhere = current->wrote_elsewhere || (to_write && rank != current->self.rank);
#ifndef DIVNORM_EMULATED_THREADS
  if (!to_write) ++(rank == current->self.rank ? looked_up.own : looked_up.others);
#endif
  return current->cluster->blocks.at(rank)->shared.get() + current->block().offset_of(address, 1);
}

// What its threads have fenced, any of them hands over.
void sync_warp() {
  emulation::give_way();
  if (emulation::left_out(Word::sync_warps)) return;
  const Locked locked;
  emulation::Meeting& warp = current->block().warps[current->warp()];
  const int64_t phase = warp.arrive(kWarp, std::exchange(current->fenced, false));
  current->fenced = warp.wait(phase, "a barrier of its warp");
}

double shuffle_xor(double value, int mask) {
  emulation::Block& block = current->block();
  const int thread = current->self.thread, threads = current->self.threads;
  double* values = block.exchange.data() + current->shuffles++ % 2 * threads;
  ++current->recorded.shuffles_of_phase;
  values[thread] = value;
  {
    const Locked locked;
    emulation::Meeting& warp = block.warps[current->warp()];
    warp.wait(warp.arrive(kWarp, true), "a shuffle");
  }
  return values[thread ^ mask];
}

static void check_late() {
  if (current->early) fail("global memory is touched before the launch before has ended");
}

void count_read(const void* address, int bytes) {
  emulation::count(address, bytes, false, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}
void count_write(const void* address, int bytes) {
  emulation::count(address, bytes, true, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

int take_ticket(int* counter) {
  check_late();
  return (*counter)++;
}
void signal(int* counter) {
  check_late();
  ++*counter;
}
int arrive(int* counter) {
  check_late();
  return (*counter)++;
}
void signal(uint64_t* flag, uint64_t number) {
  count_write(flag, sizeof number);
  emulation::give_way();
  if (emulation::left_out(Word::signal)) return;
  __atomic_store_n(flag, number, __ATOMIC_RELEASE);
  const Locked locked;
  waiting_for_flags->wake();
}
void wait_for_all(uint64_t* flags, int64_t count, uint64_t number) {
  if (emulation::left_out(Word::wait_for_all)) return;
  for (int64_t i = current->self.thread; i < count; i += current->self.threads) {
    count_read(flags + i, sizeof number);
    const auto shown = [&] { return __atomic_load_n(flags + i, __ATOMIC_ACQUIRE) == number; };
    {
      const Locked locked;
      waiting_for_flags->wait(shown, [&] { return "the flag of block " + std::to_string(i); });
    }
    shown();  // and takes what comes with it
    store(flags + i, uint64_t{0});
  }
}
void wait_for_launch_before() { current->early = false; }
void wait_for(int* counter, int count) {
  check_late();
  if (*counter >= count) return;
  std::fprintf(stderr, "an item waits for one of a higher number: %d of %d are done\n", *counter, count);
  std::abort();
}

}  // namespace device

namespace emulation {

#ifdef DIVNORM_EMULATED_THREADS  // a lock around the counts would put the threads in an order and hide their races
void count(const void*, int, bool, uintptr_t) { device::check_late(); }
#else
static Traffic& traffic_at(const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  auto found = watched.upper_bound(at);
  if (found == watched.begin()) return elsewhere;
  --found;
  return at < found->first + found->second.bytes ? found->second.traffic : elsewhere;
}
void count(const void* address, int bytes, bool write, uintptr_t site) {
  device::check_late();
  Traffic& traffic = traffic_at(address);
  (write ? traffic.written : traffic.read) += bytes;
  if (keeping_costs) keep_access(Space::global, address, bytes, site, write);
}
#endif

void count_store(const void* address, int bytes, uintptr_t site) {
  if (keeping_costs) keep_access(Space::counted, address, bytes, site, true);
}

void end_phase(Ending ending, int64_t at) {
  if (keeping_costs) current->recorded.end_phase({ending, at});
}

// The calling thread has come to the end of the kernel.
static void end_thread() {
  const Locked locked;
  end_phase(Ending::kernel);
  const auto unread = [](const Group& group) { return group.unread > 0; };
  if (unread(current->groups.back())) fail("ends before it has committed its last copies out");
  if (std::any_of(current->groups.begin(), current->groups.end(), unread))
    fail("ends before its copies out have read shared memory");
  Block& block = current->block();
  block.ends.give(0);
  if (--block.unfinished > 0) return;
  block.ends.take(0);
  end_memory(block);
}

// The blocks of whole clusters, first..end.
static void run_clusters(int64_t first, int64_t end, const Launched& launch, bool early,
                         const std::function<void()>& kernel) {
  std::deque<Cluster> clusters;
  std::deque<Thread> all;
  for (int64_t number = first; number < end; ++number) {
    const int rank = static_cast<int>(number % launch.cluster);
    if (rank == 0) clusters.emplace_back(number, launch.cluster, launch.threads, launch.shared_bytes);
    Block& block = *clusters.back().blocks[rank];
    prepare_copies(block);
    for (int t = 0; t < launch.threads; ++t)
      block.threads.push_back(&all.emplace_back(device::Self{t, launch.threads, rank, number}, clusters.back(), early));
  }
  forget_copies();
  run_together(
      all,
      [&] {
        kernel();
        end_thread();
      },
      complete_one);
  complete_all();
  for (const Thread& thread : all)
    for (int word = 0; word < kWords; ++word) {
      int& most = words_met[word][thread.warp()];
      most = std::max(most, thread.met[word]);
    }
  auto thread = all.begin();
  for (; keeping_costs && first < end; first += launch.cluster) {
    std::vector<Recorded> recorded;
    for (int i = 0; i < launch.cluster * launch.threads; ++i) recorded.push_back(std::move((thread++)->recorded));
    kept_costs.add_cluster(first, recorded);
  }
}

void run(int64_t blocks, int cluster, int threads, int shared_bytes, bool early, const std::function<void()>& kernel,
         int64_t together) {
  if (blocks % cluster != 0 || threads % device::kWarp != 0) fail("a grid of broken clusters");
  count_launch();
  for (std::vector<int>& met : words_met) met.assign(threads / device::kWarp, 0);
  const int64_t alone = (blocks - together) / cluster * cluster;  // so many blocks, their clusters one by one
  int64_t end = keeping_costs ? std::min(blocks, (most_blocks + cluster - 1) / cluster * cluster) : blocks;
  if (end > alone) end = blocks;
  const Launched launch{blocks, end, cluster, threads, shared_bytes};
  if (keeping_costs) kept_costs.start(launch);
  waiting_for_flags = std::make_unique<Sleepers>();
  for (int64_t first = 0; first < std::min(alone, end); first += cluster)
    run_clusters(first, first + cluster, launch, early, kernel);
  if (end > alone) run_clusters(alone, end, launch, early, kernel);
}

int met(Word word, int warp) { return words_met[static_cast<int>(word)].at(warp); }

void watch(const void* address, int64_t bytes) { watched[reinterpret_cast<uintptr_t>(address)] = {bytes, {}}; }
Traffic traffic_of(const void* address) { return watched.at(reinterpret_cast<uintptr_t>(address)).traffic; }
Traffic traffic_elsewhere() { return elsewhere; }
void forget_traffic() {
  watched.clear();
  elsewhere = {};
  looked_up = {};
}
Lookups lookups() { return looked_up; }

void keep_costs(int64_t blocks) {
  keeping_costs = blocks > 0;
  most_blocks = blocks;
  kept_costs = {};
}
const Costs& costs() { return kept_costs; }

void touched(const void* address, int bytes, bool write, uintptr_t site) {
  if (current == nullptr || !(keeping_costs || write)) return;
  const auto* at = static_cast<const unsigned char*>(address);
  for (const auto& block : current->cluster->blocks) {
    if (at < block->shared.get() || at >= block->shared.get() + block->bytes) continue;
    if (write) block->by_thread(address, bytes);
    if (keeping_costs)
      keep_access(block.get() == &current->block() ? Space::shared : Space::others, address, bytes, site, write);
    return;
  }
}

}  // namespace emulation
}  // namespace divnorm::cuda
