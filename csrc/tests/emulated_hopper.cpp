#include "emulated_hopper.h"

#include <cstring>
#include <utility>

#include "emulated_copies.h"
#include "emulated_state.h"

namespace divnorm::cuda::device {
namespace {

using namespace emulation;

constexpr int kUnit = 16;  // bytes, of which bulk copies move multiples from and to multiples

// What a Barrier holds: where its mbarrier is kept, marked, so that one that was never made, or was written over, is
// known.
constexpr uint64_t kMark = uint64_t{0xb477} << 48;
uint64_t state_of(const Mbarrier* barrier) { return reinterpret_cast<uintptr_t>(barrier) ^ kMark; }

uintptr_t address_of(const void* address) { return reinterpret_cast<uintptr_t>(address); }

std::string place_of(const Block& block, const Barrier* barrier) {
  return "byte " + std::to_string(block.offset_of(barrier, sizeof *barrier)) + " of block " +
         std::to_string(block.number);
}

// A block's mbarrier, for as long as the lock is held. What is in shared memory is read before, as any thread reads it.
struct Held {
  Held(const Block& block, const Barrier* barrier) : state(barrier->state), at(find(block, barrier)) {}

  const uint64_t state;
  const Locked locked;
  Mbarrier& at;

 private:
  Mbarrier& find(const Block& block, const Barrier* barrier) const {
    for (const auto& made : block.mbarriers) {
      if (state_of(made.get()) != state || made->offset() != block.offset_of(barrier, sizeof *barrier)) continue;
      if (!made->usable_by(current)) fail("nobody has said that the barrier is made, at " + place_of(block, barrier));
      return *made;
    }
    fail("there is no barrier at " + place_of(block, barrier));
  }
};

// Block `rank` of the cluster, which this thread may reach.
Block& reach(int rank) {
  Block& block = *current->cluster->blocks.at(rank);
  if (rank == current->self.rank) return block;
  if (!current->started) fail("block " + std::to_string(block.number) + " may not have started yet");
  const Locked locked;
  if (block.unfinished == 0) fail("block " + std::to_string(block.number) + " has ended");
  return block;
}

template <class V>
V* in(Block& block, V* address) {
  return reinterpret_cast<V*>(block.shared.get() + current->block().offset_of(address, sizeof(V)));
}

void check_bulk(const Block& block, const void* shared, const void* global, int bytes) {
  if (bytes <= 0 || bytes % kUnit != 0 || address_of(global) % kUnit != 0 ||
      block.offset_of(shared, bytes) % kUnit != 0)
    fail("a bulk copy of " + std::to_string(bytes) + " bytes, or between addresses, that are no multiples of 16");
  for (const auto& barrier : block.mbarriers)
    if (const int64_t offset = barrier->offset() - block.offset_of(shared, bytes); offset >= 0 && offset < bytes)
      fail("a bulk copy of a barrier");
}

void check_handed() {
  if (!current->handed)
    fail("copies out what was not handed to it behind fences, by the barrier that it has passed last");
}

// Rows that a copy moves together: each is on its way by itself.
class Box {
 public:
  Box(void* shared, const TensorMap& map, Corner at) : shared_(static_cast<unsigned char*>(shared)) {
    std::memcpy(&of_, &map, sizeof of_);
    if (rows() < 1) fail("a copy of a box that nobody has described");
    const int64_t in_row = int64_t{at.word} * kBoxWord;
    if (at.row < 0 || at.row + rows() > of_.rows || in_row < 0 || in_row + row_bytes() > of_.pitch)
      fail("a box that does not lie in its tensor");
    if (current->block().offset_of(shared, bytes()) % kBoxAlignment != 0)
      fail("a box at an address that is no multiple of " + std::to_string(kBoxAlignment));
    global_ = static_cast<unsigned char*>(const_cast<void*>(of_.first)) + at.row * of_.pitch + in_row;
  }
  int rows() const { return of_.box.rows; }
  int row_bytes() const { return of_.box.row_bytes; }
  int bytes() const { return rows() * row_bytes(); }
  unsigned char* shared(int row) const { return shared_ + row * row_bytes(); }
  unsigned char* global(int row) const { return global_ + row * of_.pitch; }

 private:
  BoxedTensor of_;
  unsigned char *shared_, *global_;
};

// What the calling thread hands over with an arrival: whether it has fenced since the last one.
bool take_fenced() { return std::exchange(current->fenced, false); }

void arrive_at(Block& block, Barrier* barrier, int bytes) {
  give_way();
  const bool without_bytes = bytes > 0 && left_out(Word::expect), without_arrival = left_out(Word::arrive);
  const Held held(block, barrier);
  held.at.edges().give(held.at.phase());
  if (bytes > 0 && !without_bytes) held.at.expect(bytes);
  if (!without_arrival) held.at.arrive(take_fenced(), &block != &current->block());
}

void wait_at(Barrier* barrier, int parity, bool of_cluster) {
  give_way();
  if (left_out(Word::wait)) return;
  const Held held(current->block(), barrier);
  end_phase(Ending::mbarrier, held.at.offset());
  const Mbarrier::Ended ended = held.at.wait(parity);
  const auto [before, first] = current->waited.try_emplace(&held.at, Waited{ended.phase, true});
  if (!first) {
    auto& [phase, every] = before->second;
    every = every && (phase & 1) != parity;
    if (every && ended.phase != phase + 1)
      fail("has waited for phase " + std::to_string(phase) + " last, and now for " + std::to_string(ended.phase) +
           ", at the barrier at " + place_of(current->block(), barrier));
    phase = ended.phase;
  }
  if (ended.of_others && !of_cluster) fail("waits for other blocks as if for its own");
  if (ended.phase >= 0 && !ended.bytes) current->handed = ended.fenced;
}

}  // namespace

void init(Barrier* barrier, int arrivals) {
  give_way();
  if (left_out(Word::init)) return;
  Block& block = current->block();
  const int64_t offset = block.offset_of(barrier, sizeof *barrier);
  if (offset % alignof(Barrier) != 0) fail("a barrier at " + place_of(block, barrier));
  auto made = std::make_unique<Mbarrier>(current, offset, arrivals);
  barrier->state = state_of(made.get());
  const Locked locked;
  for (const auto& other : block.mbarriers)
    if (other->offset() == offset) fail("there already is a barrier at " + place_of(block, barrier));
  current->unpublished.push_back(made.get());
  block.mbarriers.push_back(std::move(made));
}

void inits_done() {
  give_way();
  if (left_out(Word::inits_done)) return;
  const Locked locked;
  for (Mbarrier* barrier : current->unpublished) barrier->publish();
  current->unpublished.clear();
}

void arrive(Barrier* barrier) { arrive_at(current->block(), barrier, 0); }
void arrive_expecting(Barrier* barrier, int bytes) { arrive_at(current->block(), barrier, bytes); }
void arrive_in_block(Barrier* barrier, int rank) {
  Block& block = reach(rank);
  arrive_at(block, in(block, barrier), 0);
}

void expect(Barrier* barrier, int bytes) {
  give_way();
  if (!left_out(Word::expect)) Held(current->block(), barrier).at.expect(bytes);
}

void wait(Barrier* barrier, int parity) { wait_at(barrier, parity, false); }
void wait_for_cluster(Barrier* barrier, int parity) { wait_at(barrier, parity, true); }

void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier) {
  give_way();
  if (left_out(Word::copy_in)) return;
  count(global, bytes, false, address_of(__builtin_return_address(0)));
  const Held held(current->block(), barrier);
  check_bulk(current->block(), shared, global, bytes);
  start_copy_in(shared, global, bytes, held.at);
}

void copy_bulk_out(void* global, const void* shared, int bytes) {
  give_way();
  if (left_out(Word::copy_out)) return;
  count(global, bytes, true, address_of(__builtin_return_address(0)));
  const Locked locked;
  check_bulk(current->block(), shared, global, bytes);
  current->block().check_fenced(shared, bytes);
  check_handed();
  start_copy_out(global, shared, bytes);
}

void copy_box(void* shared, const TensorMap& map, Corner at, Barrier* barrier) {
  give_way();
  if (left_out(Word::copy_in)) return;
  const Box box(shared, map, at);
  count(box.global(0), box.bytes(), false, address_of(__builtin_return_address(0)));
  const Held held(current->block(), barrier);
  for (int i = 0; i < box.rows(); ++i) {
    check_bulk(current->block(), box.shared(i), box.global(i), box.row_bytes());
    start_copy_in(box.shared(i), box.global(i), box.row_bytes(), held.at);
  }
}

void copy_box_out(const TensorMap& map, Corner at, const void* shared) {
  give_way();
  if (left_out(Word::copy_out)) return;
  const Box box(const_cast<void*>(shared), map, at);
  count(box.global(0), box.bytes(), true, address_of(__builtin_return_address(0)));
  const Locked locked;
  current->block().check_fenced(shared, box.bytes());
  check_handed();
  for (int i = 0; i < box.rows(); ++i) {
    check_bulk(current->block(), box.shared(i), box.global(i), box.row_bytes());
    start_copy_out(box.global(i), box.shared(i), box.row_bytes());
  }
}

void commit_copies_out() {
  give_way();
  if (left_out(Word::commit)) return;
  const Locked locked;
  current->groups.emplace_back();
}

void wait_for_copies_out(int all_but, bool written) {
  give_way();
  if (left_out(written ? Word::copies_out_done : Word::copies_out_read)) return;
  const Locked locked;
  const int count = static_cast<int>(current->groups.size()) - 1 - all_but;
  const auto first_missing = [&] {
    for (int i = 0; i < count; ++i)
      if (const Group& group = current->groups[i]; (written ? group.unwritten : group.unread) > 0) return i;
    return count;
  };
  current->copies.wait([&] { return first_missing() >= count; },
                       [&] { return "copies out, group " + std::to_string(first_missing()); });
  for (int i = 0; i < count; ++i) {
    current->groups[i].read.take(0);
    if (written) current->groups[i].written.take(0);
  }
}

void fence_async() {
  give_way();
  if (left_out(Word::fence_async)) return;
  current->fences.fetch_add(1, std::memory_order_release);
  current->fenced = true;
}

void store_async(void* address, const void* value, int bytes, int rank, Barrier* barrier) {
  give_way();
  if (left_out(Word::store_async)) return;
  Block& to = reach(rank);
  const int64_t offset = current->block().offset_of(address, bytes);
  if (offset % bytes != 0) fail("a store of " + std::to_string(bytes) + " bytes at byte " + std::to_string(offset));
  void* there = to.shared.get() + offset;
  count_store(there, bytes, address_of(__builtin_return_address(0)));
  const Held held(to, in(to, barrier));
  start_store(to, there, value, bytes, held.at);
}

static int64_t arrive_at_warps(int id, int threads, bool stays) {
  if (id < 1 || id >= Block::kWarpBarriers || threads < kWarp || threads % kWarp != 0 ||
      threads > current->self.threads)
    fail("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
  return current->block().some_warps[id].arrive(id, current->self.thread, threads, take_fenced(), stays);
}

void sync_warps(int id, int threads) {
  give_way();
  if (left_out(Word::sync_warps)) return;
  end_phase(Ending::warps, id);
  const Locked locked;
  current->handed = current->block().some_warps[id].wait(arrive_at_warps(id, threads, true), id);
}

void arrive_warps(int id, int threads) {
  give_way();
  if (left_out(Word::arrive_warps)) return;
  const Locked locked;
  arrive_at_warps(id, threads, false);
}

}  // namespace divnorm::cuda::device
