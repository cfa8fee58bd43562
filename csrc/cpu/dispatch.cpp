#include <cstring>

#include "kernels.h"

namespace divnorm {

#ifdef DIVNORM_HAS_baseline
namespace baseline {
extern const CpuKernels kernels;
}
#endif
#ifdef DIVNORM_HAS_avx2
namespace avx2 {
extern const CpuKernels kernels;
}
#endif
#ifdef DIVNORM_HAS_avx512
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

namespace {

struct Candidate {
  const CpuKernels* kernels;
  bool runs;
};

int candidates(Candidate out[kMaxInstructionSets]) {
  int count = 0;
#if defined(DIVNORM_HAS_avx2) || defined(DIVNORM_HAS_avx512)
  __builtin_cpu_init();
  const bool avx2_runs =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#ifdef DIVNORM_HAS_avx512
  const bool avx512_runs = avx2_runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  out[count++] = {&avx512::kernels, avx512_runs};
#endif
#ifdef DIVNORM_HAS_avx2
  out[count++] = {&avx2::kernels, avx2_runs};
#endif
#ifdef DIVNORM_HAS_baseline
  out[count++] = {&baseline::kernels, true};
#endif
  return count;
}

}  // namespace

int supported_instruction_sets(const char* names[kMaxInstructionSets]) {
  Candidate all[kMaxInstructionSets];
  const int count = candidates(all);
  int written = 0;
  for (int i = 0; i < count; ++i)
    if (all[i].runs) names[written++] = all[i].kernels->name;
  return written;
}

const CpuKernels* kernels_for(const char* name) {
  Candidate all[kMaxInstructionSets];
  const int count = candidates(all);
  for (int i = 0; i < count; ++i)
    if (all[i].runs && (name == nullptr || std::strcmp(name, all[i].kernels->name) == 0)) return all[i].kernels;
  return nullptr;
}

}  // namespace divnorm
