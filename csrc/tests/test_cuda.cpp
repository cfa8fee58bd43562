// The CUDA kernels on the emulated device, without Python, for sanitizers: every case with every strategy.
#include <map>

#include "cuda_runner.h"

constexpr int kCluster = 4;
constexpr int64_t kMostNumbers = 20000;  // of a case: the sanitizer and the emulation together are slow

int main() {
  using namespace divnorm;
  using namespace divnorm::tests;
  std::map<std::string, int> reached;
  for (const char* strategy : {"single-block", "cluster-resident", "two-pass"})
    for (const Case& c : cases()) {
      if (Shape(c).numel > kMostNumbers || !setting_for(strategy, c, Dtype::bfloat16, kCluster)) continue;
      ++reached[strategy];
      check_case(strategy, c, {}, [&](const Case& one, Dtype dtype, const Inputs& in, const Numbers& grad, int) {
        const auto setting = setting_for(strategy, one, dtype, kCluster);
        return run(one, dtype, in, grad, setting ? *setting : tests::setting(0, 1 << 16));
      });
    }
  for (const auto& [strategy, count] : reached) std::printf("%s: %d cases\n", strategy.c_str(), count);
  check(reached["single-block"] >= 10 && reached["cluster-resident"] >= 10 && reached["two-pass"] >= 14,
        "the strategies that the cases reach");
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
