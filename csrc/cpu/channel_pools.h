// Sums over windows of channels, of vectors whose lanes are positions: additions alone, as many for any window.
#pragma once

#include "channel_plan.h"

namespace divnorm::DIVNORM_ISA {

constexpr int kMostChains = 2;  // vectors side by side: sums along channels, whose additions wait for each other

// The window of a pool, or of the transposed one, which backward sums by.
struct ChannelWindow {
  bool exponential;
  int64_t before, after;

  explicit ChannelWindow(const ChannelProblem& p) : exponential(p.exponential), before(p.before), after(p.after) {}
  ChannelWindow transposed() const {
    ChannelWindow window = *this;
    window.before = after;
    window.after = before;
    return window;
  }
  int64_t size() const { return before + after + 1; }
};

// What is summed, of vectors side by side.
template <class A, int Chains>
struct ChainSums {
  Vec<A> of[Chains];

  template <class Number>
  void add(Number&& number, int64_t c) {
    for (int j = 0; j < Chains; ++j) of[j] += number(c, j);
  }
};

// emit(c, sums of the numbers in the window of channel c), for all channels; number(c, j) is that of vector j.
// `suffixes` has room for the window's size times Chains.
//
// Windows begin in blocks as long as themselves. Each is the end of its block and the beginning of the next one: sums
// from the block's end down, kept, and one that grows as the windows move on.
template <class A, int Chains, class Number, class Emit>
void sum_boxes(int64_t channels, const ChannelWindow& window, Vec<A>* suffixes, Number number, Emit emit) {
  using Sums = ChainSums<A, Chains>;
  const int64_t size = window.size();
  for (int64_t block = -window.before; block + window.before < channels; block += size) {
    Sums run{};
    for (int64_t t = size - 1; t >= 0; --t) {
      const int64_t c = block + t;
      if (c >= 0 && c < channels) run.add(number, c);
      for (int j = 0; j < Chains; ++j) suffixes[t * Chains + j] = run.of[j];
    }
    run = {};
    const int64_t windows = smaller(size, channels - (block + window.before));
    for (int64_t t = 0; t < windows; ++t) {
      Sums sums = run;
      for (int j = 0; j < Chains; ++j) sums.of[j] += suffixes[t * Chains + j];
      emit(block + window.before + t, sums);
      if (block + size + t < channels) run.add(number, block + size + t);
    }
  }
}

// The same with weights rho^distance over all channels. `behind` has room for Chains for each channel; Slopes:
// `slopes_behind` too, and emit(c, sums, their derivatives by rho).
template <bool Slopes, class A, int Chains, class Number, class Emit>
void sum_decaying(int64_t channels, A rho, Vec<A>* behind, Vec<A>* slopes_behind, Number number, Emit emit) {
  using Sums = ChainSums<A, Chains>;
  const Vec<A> decay = splat<Vec<A>>(rho);
  Sums run{}, slope{};
  for (int64_t c = channels - 1; c >= 0; --c) {
    for (int j = 0; j < Chains; ++j) {
      behind[c * Chains + j] = run.of[j];
      if constexpr (Slopes) slopes_behind[c * Chains + j] = slope.of[j];
    }
    run.add(number, c);
    for (int j = 0; j < Chains; ++j) {
      if constexpr (Slopes) slope.of[j] = run.of[j] + decay * slope.of[j];
      run.of[j] *= decay;
    }
  }
  run = slope = {};
  for (int64_t c = 0; c < channels; ++c) {
    for (int j = 0; j < Chains; ++j) {
      if constexpr (Slopes) slope.of[j] = run.of[j] + decay * slope.of[j];
      run.of[j] *= decay;
    }
    run.add(number, c);
    Sums sums = run, slopes = slope;
    for (int j = 0; j < Chains; ++j) {
      sums.of[j] += behind[c * Chains + j];
      if constexpr (Slopes) slopes.of[j] += slopes_behind[c * Chains + j];
    }
    if constexpr (Slopes)
      emit(c, sums, slopes);
    else
      emit(c, sums);
  }
}

}  // namespace divnorm::DIVNORM_ISA
