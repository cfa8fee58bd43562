// The CUDA kernels on the emulated device, without Python, for sanitizers: every case with every strategy.
#include <map>

#include "../cuda/epilogue.h"
#include "../cuda/maps.h"
#include "channels_runner.h"
#include "cuda_runner.h"
#include "seam_runner.h"

constexpr int kCluster = 4;
// Of a case, and of one of the family, whose small ones come to the same kernels: the sanitizer and the emulation
// together are slow.
constexpr int64_t kMostNumbers = 20000, kMostOfFamily = 3000;

using namespace divnorm;
using namespace divnorm::tests;

// Around every multiple's edge that the largest numbers have.
void check_division() {
  bool right = true;
  for (int shift = 0; shift <= 30; ++shift)
    for (int64_t near = -2; near <= 2; ++near) {
      const int64_t divisor = (int64_t{1} << shift) + near;
      if (divisor < 1 || divisor > cuda::kMostPositions) continue;
      const cuda::Divider by = cuda::divider(divisor);
      for (int64_t multiple : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{1000}, ((int64_t{1} << 31) - 1) / divisor})
        for (int64_t number = multiple * divisor - 1; number <= multiple * divisor + 1; ++number)
          if (number >= 0 && number < int64_t{1} << 31)
            right = right && cuda::quotient(by, static_cast<int>(number)) == number / divisor;
    }
  check(right, "quotients by a multiplication");
}

// What is no number passes a threshold, and a threshold that is none stops all else; nothing is infinite by
// subtraction.
void check_thresholds() {
  using Four = cuda::Pack<double, 4>;
  const Four z{1, NAN, -1, 1}, thresholds{0, 0, 0, NAN};
  const auto threshold = [&] { return thresholds; };
  Four y = z, upstream{INFINITY, INFINITY, INFINITY, 2};
  cuda::activate<cuda::Form::general>(Activation::tlu, y, threshold);
  const Four stopped = cuda::pass_back<cuda::Form::general>(Activation::tlu, z, upstream, threshold);
  check(y.at[0] == 1 && std::isnan(y.at[1]) && y.at[2] == 0 && std::isnan(y.at[3]), "y at thresholds");
  const double passed[] = {INFINITY, INFINITY, 0, 0}, rest[] = {0, 0, INFINITY, 2};
  check(std::equal(passed, passed + 4, upstream.at) && std::equal(rest, rest + 4, stopped.at), "dy at thresholds");
}

int main() {
  check_division();
  check_thresholds();
  std::map<std::string, int> reached;
  std::vector<Case> all = cases();
  for (const Case& c : family_cases())
    if (Shape(c).numel <= kMostOfFamily) all.push_back(c);
  for (const char* strategy : {"single-block", "cluster-resident", "two-pass"})
    for (const Case& c : all) {
      if (Shape(c).numel > kMostNumbers || !setting_for(strategy, c, Dtype::bfloat16, kCluster)) continue;
      ++reached[strategy];
      check_case(strategy, c, {}, [&](const Case& one, Dtype dtype, const Inputs& in, const Numbers& grad, int) {
        const auto setting = setting_for(strategy, one, dtype, kCluster);
        return run(one, dtype, in, grad, setting ? *setting : tests::setting(0, 1 << 16));
      });
    }
  for (const Case& c : all) {
    const auto setting = setting_for("two-pass", c, Dtype::bfloat16, 0);
    if (Shape(c).numel > kMostNumbers || !has_halves(c) || !setting) continue;
    ++reached["halves"];
    check_case("halves", c, {}, [&](const Case& one, Dtype dtype, const Inputs& in, const Numbers& grad, int) {
      return run_halves(one, dtype, in, grad, *setting);
    });
  }
  for (const auto& [strategy, count] : reached) std::printf("%s: %d cases\n", strategy.c_str(), count);
  check(reached["single-block"] >= 10 && reached["cluster-resident"] >= 10 && reached["two-pass"] >= 14 &&
            reached["halves"] >= 8,
        "the strategies that the cases reach");
  for (const ChannelCase& c : channel_cases()) check_channels(c, run_channels);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
