#include "emulated_device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#ifdef DIVNORM_EMULATED_THREADS
#include <pthread.h>

#include <thread>
#else
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include "stacks.h"
#endif

namespace divnorm::cuda {
namespace {

// Everybody who takes part arrives before anybody goes on. round: how often the caller has waited here before.
class Barrier {
 public:
  explicit Barrier(int count);
  ~Barrier();
  void wait(int round);

 private:
#ifdef DIVNORM_EMULATED_THREADS
  // Two in turns: ThreadSanitizer takes one that leaves late to have seen whoever has come again by then.
  pthread_barrier_t barriers_[2];
#else
  int count_, arrived_ = 0;
  int64_t generation_ = 0;
#endif
};

struct Block {
  Block(int threads, int shared_bytes)
      : barrier(threads), shared(new unsigned char[shared_bytes]), bytes(shared_bytes) {
    std::memset(shared.get(), 0xff, shared_bytes);  // NaN in every type
    for (int warp = 0; warp < threads / device::kWarp; ++warp)
      warps.push_back(std::make_unique<Barrier>(device::kWarp));
    exchange.resize(2 * threads);
  }
  Barrier barrier;
  std::unique_ptr<unsigned char[]> shared;
  int bytes;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<double> exchange;  // of shuffles, two rounds deep
};

struct Cluster {
  Cluster(int blocks, int threads, int shared_bytes) : barrier(blocks * threads) {
    for (int i = 0; i < blocks; ++i) this->blocks.push_back(std::make_unique<Block>(threads, shared_bytes));
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Thread {
  device::Self self;
  Cluster* cluster;
  int barriers = 0;              // met, left out or not
  bool early = false;            // has to wait for the launch before
  bool wrote_elsewhere = false;  // to another block since the last barrier that waits for that
  int block_rounds = 0, cluster_rounds = 0, shuffles = 0;
  emulation::Recorded recorded = {};  // where costs are kept
  Block& block() const { return *cluster->blocks[self.rank]; }
};

bool keeping_costs = false;
int64_t most_blocks = 0;
emulation::Costs kept_costs;

// A barrier has been come to, or the end.
void end_phase(Thread& thread, emulation::Ending ending) {
  if (keeping_costs) thread.recorded.end_phase(ending);
}

int left_out_launch = -1, left_out_barrier = -1;
int launches = 0;

#ifdef DIVNORM_EMULATED_THREADS

thread_local Thread* current = nullptr;

Barrier::Barrier(int count) {
  for (pthread_barrier_t& barrier : barriers_) pthread_barrier_init(&barrier, nullptr, count);
}
Barrier::~Barrier() {
  for (pthread_barrier_t& barrier : barriers_) pthread_barrier_destroy(&barrier);
}
void Barrier::wait(int round) { pthread_barrier_wait(&barriers_[round % 2]); }

void run_together(std::vector<Thread>& threads, const std::function<void()>& kernel) {
  std::vector<std::thread> running;
  for (Thread& thread : threads)
    running.emplace_back([&thread, &kernel] {
      current = &thread;
      kernel();
      end_phase(thread, emulation::Ending::kernel);
    });
  for (std::thread& thread : running) thread.join();
}

#else

Thread* current = nullptr;

// Fibers take turns; one that waits at a barrier gives its turn away.
class Fibers {
 public:
  void run(std::vector<Thread>& threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    while (fibers_.size() < threads.size()) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack.reset(new char[kStackBytes]);
    }
    for (size_t i = 0; i < threads.size(); ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.thread = &threads[i];
      fiber.done = false;
      fiber.context.start(fiber.stack.get(), kStackBytes, &Fibers::enter);
    }
    for (size_t left = threads.size(); left > 0;)
      for (size_t i = 0; i < threads.size(); ++i) {
        if (fibers_[i]->done) continue;
        turn_ = fibers_[i].get();
        current = turn_->thread;
        switch_to(turn_->context, home_, turn_->stack.get(), kStackBytes, &home_fake_);
        if (turn_->done) --left;
      }
    current = nullptr;
  }
  void yield() {
    Fiber* fiber = turn_;
    switch_to(home_, fiber->context, home_stack_, home_bytes_, &fiber->fake);
  }

 private:
  static constexpr size_t kStackBytes = 128 << 10;
  struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack;
    Thread* thread = nullptr;
    void* fake = nullptr;
    bool done = false;
  };

  static void enter();

  // AddressSanitizer is told of every change of stacks.
  void switch_to(Context& to, Context& from, const void* stack, size_t bytes, void** fake) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(fake, stack, bytes);
    to.switch_to(from);
    __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
#else
    static_cast<void>(stack), static_cast<void>(bytes), static_cast<void>(fake);
    to.switch_to(from);
#endif
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void()>* kernel_ = nullptr;
  Fiber* turn_ = nullptr;
  Context home_;
  void* home_fake_ = nullptr;
  const void* home_stack_ = nullptr;
  size_t home_bytes_ = 0;
} fibers;

void Fibers::enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &fibers.home_stack_, &fibers.home_bytes_);
#endif
  (*fibers.kernel_)();
  end_phase(*fibers.turn_->thread, emulation::Ending::kernel);
  Fiber* fiber = fibers.turn_;
  fiber->done = true;
  fibers.switch_to(fibers.home_, fiber->context, fibers.home_stack_, fibers.home_bytes_, nullptr);
}

Barrier::Barrier(int count) : count_(count) {}
Barrier::~Barrier() = default;
void Barrier::wait(int) {
  if (++arrived_ == count_) {
    arrived_ = 0;
    ++generation_;
    return;
  }
  for (const int64_t generation = generation_; generation == generation_;) fibers.yield();
}

void run_together(std::vector<Thread>& threads, const std::function<void()>& kernel) { fibers.run(threads, kernel); }

#endif

struct Watched {
  int64_t bytes;
  emulation::Traffic traffic;
};
std::map<uintptr_t, Watched> watched;  // by address
emulation::Traffic elsewhere;
emulation::Lookups looked_up;

void keep_access(emulation::Space space, const void* address, int bytes, uintptr_t site, bool write = false) {
  emulation::Recorded& recorded = current->recorded;
  recorded.accesses.push_back(
      {site, reinterpret_cast<uintptr_t>(address), bytes, static_cast<int>(recorded.endings.size()), space, write});
}

bool left_out_now() { return current->barriers++ == left_out_barrier && launches - 1 == left_out_launch; }

}  // namespace

namespace device {

const Self& self() { return current->self; }
unsigned char* shared_memory() { return current->block().shared.get(); }
void sync_block() {
  if (left_out_now()) return;
  end_phase(*current, emulation::Ending::block);
  current->block().barrier.wait(current->block_rounds++);
}

static void wait_for_cluster(int size, emulation::Ending ending) {
  if (size != static_cast<int>(current->cluster->blocks.size())) throw std::logic_error("not the cluster's size");
  if (left_out_now()) return;
  end_phase(*current, size == 1 ? emulation::Ending::block : ending);
  current->cluster->barrier.wait(current->cluster_rounds++);
}
void sync_cluster(int size) {
  current->wrote_elsewhere = false;
  wait_for_cluster(size, emulation::Ending::cluster);
}
void sync_cluster_shared(int size) {
  if (current->wrote_elsewhere) throw std::logic_error("a barrier for what blocks write to their own memory");
  wait_for_cluster(size, emulation::Ending::cluster_shared);
}

unsigned char* in_block(unsigned char* address, int rank, bool to_write) {
  current->wrote_elsewhere = current->wrote_elsewhere || (to_write && rank != current->self.rank);
#ifndef DIVNORM_EMULATED_THREADS
  if (!to_write) ++(rank == current->self.rank ? looked_up.own : looked_up.others);
#endif
  const Block& here = current->block();
  const int64_t offset = address - here.shared.get();
  if (offset < 0 || offset >= here.bytes) throw std::logic_error("not an address in this block's shared memory");
  return current->cluster->blocks.at(rank)->shared.get() + offset;
}

double shuffle_xor(double value, int mask) {
  Block& block = current->block();
  const int thread = current->self.thread, threads = current->self.threads;
  const int round = current->shuffles++;
  ++current->recorded.shuffles_of_phase;
  double* values = block.exchange.data() + round % 2 * threads;
  values[thread] = value;
  block.warps[thread / kWarp]->wait(round);
  return values[thread ^ mask];
}

static void check_late() {
  if (current->early) throw std::logic_error("global memory is touched before the launch before has ended");
}

#ifdef DIVNORM_EMULATED_THREADS  // a lock around the counts would put the threads in an order and hide their races
void count_read(const void*, int) { check_late(); }
void count_write(const void*, int) { check_late(); }
#else
static emulation::Traffic& traffic_at(const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  auto found = watched.upper_bound(at);
  if (found == watched.begin()) return elsewhere;
  --found;
  return at < found->first + found->second.bytes ? found->second.traffic : elsewhere;
}
void count_read(const void* address, int bytes) {
  check_late();
  traffic_at(address).read += bytes;
  if (keeping_costs)
    keep_access(emulation::Space::global, address, bytes, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}
void count_write(const void* address, int bytes) {
  check_late();
  traffic_at(address).written += bytes;
  if (keeping_costs)
    keep_access(emulation::Space::global, address, bytes, reinterpret_cast<uintptr_t>(__builtin_return_address(0)),
                true);
}
#endif

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
void wait_for_launch_before() { current->early = false; }
void wait_for(int* counter, int count) {
  check_late();
  if (*counter >= count) return;
  std::fprintf(stderr, "an item waits for one of a higher number: %d of %d are done\n", *counter, count);
  std::abort();
}

}  // namespace device

namespace emulation {

void run(int64_t blocks, int cluster, int threads, int shared_bytes, bool early, const std::function<void()>& kernel) {
  if (blocks % cluster != 0 || threads % device::kWarp != 0) throw std::logic_error("a grid of broken clusters");
  ++launches;
  const int64_t end = keeping_costs ? std::min(blocks, (most_blocks + cluster - 1) / cluster * cluster) : blocks;
  if (keeping_costs) kept_costs.start({blocks, end, cluster, threads, shared_bytes});
  for (int64_t first = 0; first < end; first += cluster) {
    Cluster together(cluster, threads, shared_bytes);
    std::vector<Thread> all;
    for (int rank = 0; rank < cluster; ++rank)
      for (int t = 0; t < threads; ++t) {
        all.push_back({{t, threads, rank, first + rank}, &together});
        all.back().early = early;
      }
    run_together(all, kernel);
    if (!keeping_costs) continue;
    std::vector<Recorded> recorded;
    for (Thread& thread : all) recorded.push_back(std::move(thread.recorded));
    kept_costs.add_cluster(first, recorded);
  }
}

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
  if (!keeping_costs || current == nullptr) return;
  const auto* at = static_cast<const unsigned char*>(address);
  for (const auto& block : current->cluster->blocks)
    if (at >= block->shared.get() && at < block->shared.get() + block->bytes)
      return keep_access(block.get() == &current->block() ? Space::shared : Space::others, address, bytes, site, write);
}
void leave_out_barrier(int launch, int barrier) {
  launches = 0;
  left_out_launch = launch;
  left_out_barrier = barrier;
}

}  // namespace emulation
}  // namespace divnorm::cuda
