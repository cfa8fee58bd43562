// As late as can be, in a random order in which some wait for most others, and harmful until then: bytes that a copy or
// a store will write are no numbers from the start, and what a copy reads may not change before it has.
#include <algorithm>
#include <cstring>
#include <utility>

#include "emulated_copies.h"

namespace divnorm::cuda::emulation {
namespace {

constexpr int kPoison = 0xff;  // NaN in every type

struct Operation {
  enum class Kind { copy_in, copy_out, write, store } kind;
  Thread* issuer;
  Block* block;  // whose shared memory it has to do with
  unsigned char *shared, *global;
  int bytes;
  Mbarrier* barrier;
  int64_t phase;                    // the barrier's at the start
  Group* group;                     // of a copy out
  std::vector<unsigned char> data;  // what a store writes, what a copy out is to find and then writes
  int rank;                         // in the order in which they are done

  std::string name() const {
    static constexpr const char* kNames[] = {"a copy into", "a copy out of", "a copy out of", "a store into"};
    const int64_t first = block->offset_of(shared, bytes);
    return std::string(kNames[static_cast<int>(kind)]) + " bytes " + std::to_string(first) + " to " +
           std::to_string(first + bytes - 1) + " of block " + std::to_string(block->number) + " by " + name_of(*issuer);
  }
  bool writes() const { return kind == Kind::copy_in || kind == Kind::store; }
  bool meets(const Operation& other) const {
    return kind != Kind::write && shared < other.shared + other.bytes && other.shared < shared + bytes;
  }
};

std::vector<Operation> under_way;

int random_rank() {
  constexpr int kRanks = 1 << 20;
  return random_below(kRanks);
}

void start(Operation&& operation) {
  for (const Operation& other : under_way)
    if ((operation.writes() || other.writes()) && other.meets(operation))
      fail(operation.name() + " while there is " + other.name());
  operation.rank = random_rank();
  if (operation.writes()) std::memset(operation.shared, kPoison, operation.bytes);
  under_way.push_back(std::move(operation));
}

void finish(Operation&& operation) {
  const auto& [kind, issuer, block, shared, global, bytes, barrier, phase, group, data, rank] = operation;
  switch (kind) {
    case Operation::Kind::copy_in:
      std::memcpy(shared, global, bytes);
      block->not_by_threads(shared, bytes);
      barrier->complete(bytes, phase, false);
      break;
    case Operation::Kind::store:
      std::memcpy(shared, data.data(), bytes);
      block->not_by_threads(shared, bytes);
      barrier->complete(bytes, phase, block != &issuer->block());
      break;
    case Operation::Kind::copy_out:
      if (std::memcmp(shared, data.data(), bytes) != 0) fail(operation.name() + " finds what was written too late");
      --group->unread;
      issuer->copies.wake();
      operation.kind = Operation::Kind::write;
      operation.rank = random_rank();
      under_way.push_back(std::move(operation));
      break;
    case Operation::Kind::write:
      std::memcpy(global, data.data(), bytes);
      --group->unwritten;
      issuer->copies.wake();
  }
}

}  // namespace

void prepare_copies(Block&) {}

void start_copy_in(void* shared, const void* global, int bytes, Mbarrier& barrier) {
  start({Operation::Kind::copy_in,
         current,
         &current->block(),
         static_cast<unsigned char*>(shared),
         static_cast<unsigned char*>(const_cast<void*>(global)),
         bytes,
         &barrier,
         barrier.phase(),
         nullptr,
         {},
         0});
}

void start_copy_out(void* global, const void* shared, int bytes) {
  Group& group = current->groups.back();
  ++group.unread;
  ++group.unwritten;
  auto* from = static_cast<unsigned char*>(const_cast<void*>(shared));
  start({Operation::Kind::copy_out,
         current,
         &current->block(),
         from,
         static_cast<unsigned char*>(global),
         bytes,
         nullptr,
         0,
         &group,
         {from, from + bytes},
         0});
}

void start_store(Block& to, void* address, const void* value, int bytes, Mbarrier& barrier) {
  const auto* from = static_cast<const unsigned char*>(value);
  start({Operation::Kind::store,
         current,
         &to,
         static_cast<unsigned char*>(address),
         nullptr,
         bytes,
         &barrier,
         barrier.phase(),
         nullptr,
         {from, from + bytes},
         0});
}

bool complete_one() {
  if (under_way.empty()) return false;
  const auto first =
      std::min_element(under_way.begin(), under_way.end(),
                       [](const Operation& one, const Operation& other) { return one.rank < other.rank; });
  std::iter_swap(first, under_way.end() - 1);
  Operation operation = std::move(under_way.back());
  under_way.pop_back();
  finish(std::move(operation));
  return true;
}

void end_memory(const Block& block) {
  for (const Operation& operation : under_way)
    if (operation.block == &block && operation.kind != Operation::Kind::write)
      fail("its block ends while there is " + operation.name());
}

void complete_all() {
  while (complete_one()) continue;
}

void forget_copies() { under_way.clear(); }

}  // namespace divnorm::cuda::emulation
