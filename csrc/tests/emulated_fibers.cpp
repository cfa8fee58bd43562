// Threads as fibers that take turns.
#include <algorithm>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include "emulated_state.h"
#include "stacks.h"

namespace divnorm::cuda::emulation {

Thread* current = nullptr;

void fail(const std::string& error) {
  throw std::logic_error((current != nullptr ? name_of(*current) : "the launch") + ": " + error);
}

Locked::Locked() = default;
Locked::~Locked() = default;

namespace {

std::mt19937 generator;

// Whose turn it is. Without a seed one thread after the other; with one that of the first warp in a random order which
// can go on, and now and then the one that runs falls to its end.
class Order {
 public:
  void start(size_t threads, bool random) {
    random_ = random;
    ready_.assign(threads / device::kWarp, ~uint32_t{0});
    warps_.resize(ready_.size());
    for (size_t warp = 0; warp < warps_.size(); ++warp) warps_[warp] = warp;
    if (random_) std::shuffle(warps_.begin(), warps_.end(), generator);
    early_ = random_ && random_below(2) == 0;
    last_ = -1;
  }
  bool random() const { return random_; }
  // Whether what nobody waits for is done early, now and then.
  bool early() const { return early_; }
  void set_ready(int thread, bool ready) {
    const uint32_t bit = uint32_t{1} << thread % device::kWarp;
    uint32_t& warp = ready_[thread / device::kWarp];
    warp = ready ? warp | bit : warp & ~bit;
  }
  void fall_behind(int thread) {
    const auto at = std::find(warps_.begin(), warps_.end(), static_cast<size_t>(thread / device::kWarp));
    std::rotate(at, at + 1, warps_.end());
  }
  // -1: nobody can go on.
  int next() {
    if (random_) {
      for (const size_t warp : warps_)
        if (ready_[warp] != 0) return at(warp, random_below(device::kWarp));
      return -1;
    }
    const size_t first = (last_ + 1) / device::kWarp % ready_.size();
    const uint32_t behind = ready_[first] & ~uint32_t{0} << (last_ + 1) % device::kWarp;
    if (behind != 0) return last_ = static_cast<int>(first) * device::kWarp + __builtin_ctz(behind);
    for (size_t i = 1; i <= ready_.size(); ++i)
      if (const size_t warp = (first + i) % ready_.size(); ready_[warp] != 0) return last_ = at(warp, 0);
    return -1;
  }

 private:
  // The first lane of those that can go on, from `from` on.
  int at(size_t warp, int from) const {
    const uint32_t turned = ready_[warp] >> from | (from > 0 ? ready_[warp] << (device::kWarp - from) : 0);
    return static_cast<int>(warp) * device::kWarp + (__builtin_ctz(turned) + from) % device::kWarp;
  }
  std::vector<uint32_t> ready_;  // lanes of a warp, bit by bit
  std::vector<size_t> warps_;
  bool random_ = false, early_ = false;
  int last_ = -1;
};

class Fibers {
 public:
  void run(std::deque<Thread>& threads, const std::function<void()>& kernel, const std::function<bool()>& late) {
    kernel_ = &kernel;
    while (fibers_.size() < threads.size()) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack.reset(new char[kStackBytes]);
    }
    for (size_t i = 0; i < threads.size(); ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.thread = &threads[i];
      fiber.place = nullptr;
      fiber.done = false;
      fiber.context.start(fiber.stack.get(), kStackBytes, &Fibers::enter);
    }
    order_.start(threads.size(), random);
    try {
      take_turns(threads.size(), late);
    } catch (...) {
      fibers_.clear();  // where they are
      current = nullptr;
      throw;
    }
  }
  void yield() {
    Fiber& fiber = *fibers_[turn_];
    switch_to(home_, fiber.context, home_stack_, home_bytes_, &fiber.fake);
  }
  // Until it is woken.
  int sleep(const Place& place) {
    const int self = turn_;
    fibers_[self]->place = &place;
    order_.set_ready(self, false);
    return self;
  }
  void wake(int thread) {
    fibers_[thread]->place = nullptr;
    order_.set_ready(thread, true);
  }
  void give_way() {
    constexpr int kOften = 8;
    if (!order_.random() || random_below(kOften) != 0) return;
    order_.fall_behind(turn_);
    yield();
  }

  bool random = false;

 private:
  static constexpr size_t kStackBytes = 128 << 10;
  struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack;
    Thread* thread = nullptr;
    const Place* place = nullptr;  // where it sleeps
    void* fake = nullptr;
    bool done = false;
  };

  // Its frame stays on the stack, which is used again.
  [[gnu::no_sanitize_address]] static void enter();

  void take_turns(size_t threads, const std::function<bool()>& late) {
    constexpr int kOften = 16;
    for (size_t left = threads; left > 0;) {
      if (order_.early() && random_below(kOften) == 0) late();
      turn_ = order_.next();
      if (turn_ < 0) {
        if (!late()) fail(deadlock(asleep(threads)));
        continue;
      }
      Fiber& fiber = *fibers_[turn_];
      current = fiber.thread;
      switch_to(fiber.context, home_, fiber.stack.get(), kStackBytes, &home_fake_);
      current = nullptr;
      if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      if (!fiber.done) continue;
      order_.set_ready(turn_, false);
      --left;
    }
  }

  std::vector<Asleep> asleep(size_t threads) const {
    std::vector<Asleep> found;
    for (size_t i = 0; i < threads; ++i)
      if (fibers_[i]->place != nullptr) found.push_back({fibers_[i]->thread, fibers_[i]->place});
    return found;
  }

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
  Order order_;
  std::exception_ptr error_;
  int turn_ = -1;
  Context home_;
  void* home_fake_ = nullptr;
  const void* home_stack_ = nullptr;
  size_t home_bytes_ = 0;
} fibers;

void Fibers::enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &fibers.home_stack_, &fibers.home_bytes_);
#endif
  try {
    (*fibers.kernel_)();
  } catch (...) {
    fibers.error_ = std::current_exception();
  }
  Fiber* fiber = fibers.fibers_[fibers.turn_].get();
  fiber->done = true;
  fibers.switch_to(fibers.home_, fiber->context, fibers.home_stack_, fibers.home_bytes_, nullptr);
}

}  // namespace

void Sleepers::sleep(const Holds& holds, const Place& place) {
  do {
    asleep_.push_back(fibers.sleep(place));
    fibers.yield();
  } while (!holds());
}
void Sleepers::wake() {
  for (const int thread : asleep_) fibers.wake(thread);
  asleep_.clear();
}

void give_way() { fibers.give_way(); }
int random_below(int count) { return static_cast<int>(generator() % static_cast<unsigned>(count)); }

void run_together(std::deque<Thread>& threads, const std::function<void()>& kernel, const std::function<bool()>& late) {
  fibers.run(threads, kernel, late);
}

void schedule(unsigned seed) {
  fibers.random = seed != 0;
  generator.seed(seed);
}

}  // namespace divnorm::cuda::emulation
