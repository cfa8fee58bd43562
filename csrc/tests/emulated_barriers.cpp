#include "emulated_barriers.h"

#include <utility>

namespace divnorm::cuda::emulation {
namespace {

using std::to_string;

constexpr int64_t kMostCounted = (1 << 20) - 1;  // arrivals or bytes (PTX ISA, "mbarrier")

}  // namespace

int64_t Meeting::arrive(int count, bool fenced, bool stays) {
  const int64_t phase = phase_;
  edges_.give(phase);
  count_ = count;
  fenced_.all = fenced_.all && fenced;
  fenced_.left = fenced_.left && (stays || fenced);
  fenced_.any_left = fenced_.any_left || !stays;
  if (++arrived_ == count) {
    last_fenced_ = std::exchange(fenced_, {});
    arrived_ = 0;
    ++phase_;
    sleepers_.wake();
  }
  return phase;
}

bool Meeting::wait(int64_t phase, const char* name, int number) {
  sleepers_.wait([&] { return phase_ > phase; },
                 [&] {
                   return name + (number > 0 ? " " + to_string(number) : "") + ", to which " + to_string(arrived_) +
                          " of " + to_string(count_) + " have come";
                 });
  edges_.take(phase);
  return last_fenced_.any_left ? last_fenced_.left : last_fenced_.all;
}

int64_t WarpBarrier::arrive(int id, int thread, int threads, bool fenced, bool stays) {
  const bool first = count_ == 0;
  if (!first && count_ != threads)
    fail("barrier " + to_string(id) + " is one of " + to_string(count_) + " threads, not of " + to_string(threads));
  if (static_cast<int>(next_.size()) <= thread) next_.resize(thread + 1, 0);
  const int64_t phase = meeting_.arrive(threads, fenced, stays);
  if (next_[thread] > phase) fail("comes to barrier " + to_string(id) + " again before others have come once");
  next_[thread] = phase + 1;
  count_ = threads;
  return phase;
}

bool WarpBarrier::wait(int64_t phase, int id) { return meeting_.wait(phase, "barrier", id); }

Mbarrier::Mbarrier(const Thread* maker, int64_t offset, int arrivals)
    : maker_(maker), offset_(offset), arrivals_(arrivals), pending_(arrivals) {
  if (arrivals < 1 || arrivals > kMostCounted) fail("a barrier of " + to_string(arrivals) + " arrivals");
  now_ = {0, false, false, true};
}

std::string Mbarrier::missing() const {
  return "the barrier at byte " + to_string(offset_) + ", whose phase " + to_string(phase_) + " misses " +
         to_string(pending_) + " of " + to_string(arrivals_) + " arrivals and " + to_string(bytes_) + " bytes";
}

void Mbarrier::expect(int64_t bytes) {
  if (bytes < 0 || bytes_ + bytes > kMostCounted) fail("expects " + to_string(bytes) + " bytes more at " + missing());
  bytes_ += bytes;
  now_.bytes = true;
  settle();
}

void Mbarrier::arrive(bool fenced, bool of_others) {
  if (pending_ == 0) fail("arrives once too often at " + missing());
  --pending_;
  now_.fenced = now_.fenced && fenced;
  now_.of_others = now_.of_others || of_others;
  settle();
}

void Mbarrier::complete(int64_t bytes, int64_t phase, bool of_others) {
  if (phase != phase_)
    fail(to_string(bytes) + " bytes that were issued in phase " + to_string(phase) + " come to " + missing());
  if (bytes_ - bytes < -kMostCounted) fail("too many bytes come to " + missing());
  bytes_ -= bytes;
  now_.bytes = true;
  now_.of_others = now_.of_others || of_others;
  settle();
}

void Mbarrier::settle() {
  if (pending_ > 0) return;
  if (bytes_ < 0) fail("more bytes than were expected have come to " + missing());
  if (bytes_ > 0) return;
  last_ = now_;
  pending_ = arrivals_;
  now_ = {++phase_, false, false, true};
  sleepers_.wake();
}

Mbarrier::Ended Mbarrier::wait(int parity) {
  if (parity != 0 && parity != 1) fail("waits for parity " + to_string(parity));
  const int64_t waited = (phase_ & 1) == parity ? phase_ : phase_ - 1;
  sleepers_.wait([&] { return phase_ > waited; }, [&] { return missing(); });
  if (phase_ > waited + 1) fail("has waited for phase " + to_string(waited) + ", too late, at " + missing());
  edges_.take(waited);
  return last_;
}

}  // namespace divnorm::cuda::emulation
