// How the sums over partial sums are cut into blocks. No CUDA here.
#pragma once

#include "program.h"

namespace divnorm::cuda {

// Cuts a reduction whose rows and columns are known.
Reduction cut(Reduction reduction);

// What cut reductions of one launch need: blocks, and counters where a set has several of them.
struct SumsRoom {
  void add(const Reduction& reduction);
  int64_t counters() const { return several ? sets : 0; }

  int64_t sets = 0, blocks = 0;
  int threads = 0;
  bool several = false;
};

}  // namespace divnorm::cuda
