#include "emulated_state.h"

#include <cstring>
#include <map>

namespace divnorm::cuda::emulation {
namespace {

constexpr int kPoison = 0xff;  // NaN in every type
constexpr int kUnit = 2;       // bytes of the smallest number

// Of the words of every launch: the one that is left out.
struct LeftOut {
  Word word = Word::barrier;
  int launch = -1, index = -1, warp = -1;
} out;
int launches = 0;

}  // namespace

Block::Block(int64_t number, int threads, int shared_bytes)
    : number(number),
      bytes(shared_bytes),
      unfinished(threads),
      shared(new unsigned char[shared_bytes]),
      warps(threads / device::kWarp),
      exchange(2 * threads) {
  std::memset(shared.get(), kPoison, shared_bytes);
}

int64_t Block::offset_of(const void* address, int64_t size) const {
  const int64_t offset = static_cast<const unsigned char*>(address) - shared.get();
  if (offset < 0 || size < 0 || offset + size > bytes) fail("not an address in this block's shared memory");
  return offset;
}

void Block::by_thread(const void* address, int64_t size) {
  written_.resize((bytes + kUnit - 1) / kUnit);
  const int64_t first = offset_of(address, size);
  for (int64_t at = first / kUnit; at <= (first + size - 1) / kUnit; ++at) written_[at] = {current, current->fences};
}
void Block::not_by_threads(const void* address, int64_t size) {
  const int64_t first = offset_of(address, size);
  if (!written_.empty())
    for (int64_t at = first / kUnit; at <= (first + size - 1) / kUnit; ++at) written_[at] = {};
}
void Block::check_fenced(const void* address, int64_t size) const {
  const int64_t first = offset_of(address, size);
  if (written_.empty()) return;
  for (int64_t at = first / kUnit; at <= (first + size - 1) / kUnit; ++at)
    if (const auto& [by, fences] = written_[at]; by != nullptr && by->fences == fences)
      fail("copies byte " + std::to_string(at * kUnit) + " of shared memory out, which " + name_of(*by) +
           " has written without a fence behind it");
}

Cluster::Cluster(int64_t first, int blocks, int threads, int shared_bytes) {
  for (int i = 0; i < blocks; ++i) this->blocks.push_back(std::make_unique<Block>(first + i, threads, shared_bytes));
}

std::string name_of(const Thread& thread) {
  return "thread " + std::to_string(thread.self.thread) + " of block " + std::to_string(thread.self.block);
}

std::string deadlock(const std::vector<Asleep>& asleep) {
  std::map<std::string, std::pair<const Thread*, int>> at;  // who waits at the same place together
  for (const Asleep& one : asleep) {
    auto& [first, count] = at[(*one.at)() + ", in block " + std::to_string(one.thread->self.block)];
    if (count++ == 0) first = one.thread;
  }
  std::string report = "nobody can go on:";
  for (const auto& [place, who] : at) {
    report += "\n  " + name_of(*who.first);
    if (who.second > 1) report += " and " + std::to_string(who.second - 1) + " more";
    report += " at " + place;
  }
  return report;
}

bool left_out(Word word) {
  const int index = current->met[static_cast<int>(word)]++;
  return word == out.word && index == out.index && launches - 1 == out.launch &&
         (out.warp < 0 || out.warp == current->warp());
}

void leave_out(Word word, int launch, int index, int warp) {
  launches = 0;
  out = {word, launch, index, warp};
}

void count_launch() { ++launches; }

}  // namespace divnorm::cuda::emulation
