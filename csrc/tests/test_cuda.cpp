// The CUDA kernels on the emulated device, without Python, for sanitizers: every case with every strategy.
#include <map>

#include "../cuda/epilogue.h"
#include "../cuda/maps.h"
#include "channels_runner.h"
#include "cuda_runner.h"
#include "finish_runner.h"
#include "seam_runner.h"

constexpr int kCluster = 4;
// Of a case, and of one of the family, whose small ones come to the same kernels: the sanitizer and the emulation
// together are slow.
constexpr int64_t kMostNumbers = 20000, kMostOfFamily = 3000;

using namespace divnorm;
using namespace divnorm::tests;
using divnorm::cuda::emulation::Word;

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

// With blocks of which one has a sample less than others and comes to the end first: flags that are set to zero in
// front of a launch that a graph starts again, and those that are not; blocks that show no flags, or wait for none.
void check_flags() {
  const std::optional<Axes> small = window({1, 3, 3});
  const Case c{"flags", false, false, false, 5, 4, 1, {1, 5, 5}, small, small, true};
  const Shape shape(c);
  const Numbers ones(shape.numel, 1.0), affine(shape.affine, 1.0);
  const Inputs in{ones, affine, affine, {1.0}, ones, affine};
  const Numbers expected(shape.affine, static_cast<double>(c.batch * shape.positions));
  for (const int cluster : {1, 2}) {
    Setting two_parts = *finishing(cluster == 1 ? "single-block" : "cluster-resident", c, Dtype::float32, cluster);
    two_parts.device.multiprocessors = 2 * cluster;
    const auto right = [&](Flags found, std::optional<Word> without = {}) {
      constexpr int kBackward = 1;
      cuda::emulation::leave_out(without.value_or(Word::barrier), without ? kBackward : -1, 0);
      try {
        return run_finishing(c, Dtype::float32, in, ones, two_parts, found).dbias.numbers() == expected;
      } catch (const std::logic_error& error) {
        check(without.has_value(), error.what());
        return false;
      }
    };
    const std::string where = ", clusters of " + std::to_string(cluster);
    check(right(zeros), "flags" + where);
    check(right(as_it_left_them), "flags that are reset" + where);
    check(!right(own_number), "flags that are not reset" + where);
    check(!right(zeros, Word::signal), "without flags" + where);
    check(!right(zeros, Word::wait_for_all), "flags that nobody waits for" + where);
  }
  cuda::emulation::leave_out(Word::barrier, -1, 0);
}

// The case with rows of whole sixteen bytes in every type, as bulk copies want them.
Case aligned(Case c) {
  constexpr int64_t kNumbers = 8;
  int64_t& numbers = c.features ? c.extent.back() : c.channels;
  numbers = (numbers / c.groups + kNumbers - 1) / kNumbers * kNumbers * c.groups;
  c.name += ", aligned";
  return c;
}

// Maps of more numbers than an int counts, of which a pipelined block would keep all.
void check_large() {
  const Case c = {"large",           true, false, false, 1, 8, 1, {1, 1 << 14, 1 << 15}, window({1, 9, 9}),
                  window({1, 9, 9}), true};
  const Setting s = setting(kCluster, 227 << 10, 12 << 10);
  for (const Direction direction : {Direction::forward, Direction::backward})
    check(cuda::choose(problem_of(c, Dtype::bfloat16), direction, s.preferences, s.device).name() == "two-pass",
          c.name);
}

int main() {
  check_division();
  check_large();
  check_flags();
  check_thresholds();
  std::map<std::string, int> reached;
  std::vector<Case> all = cases();
  for (const Case& c : family_cases())
    if (Shape(c).numel <= kMostOfFamily) all.push_back(c);
  for (const char* strategy : {"single-block", "cluster-resident", "two-pass", "pipelined"})
    for (const Case& given : all) {
      const Case c = std::string(strategy) == "pipelined" ? aligned(given) : given;
      if (Shape(c).numel > kMostNumbers || !setting_for(strategy, c, Dtype::bfloat16, kCluster)) continue;
      ++reached[strategy];
      check_case(strategy, c, {}, [&](const Case& one, Dtype dtype, const Inputs& in, const Numbers& grad, int) {
        const auto setting = setting_for(strategy, one, dtype, kCluster);
        return run(one, dtype, in, grad, setting ? *setting : tests::setting(0, 1 << 16));
      });
    }
  for (const char* strategy : {"single-block", "cluster-resident"})
    for (const Case& c : all) {
      if (Shape(c).numel > kMostNumbers || !finishing(strategy, c, Dtype::bfloat16, kCluster)) continue;
      const std::string who = std::string(strategy) + ", sums inside";
      ++reached[who];
      check_case(who, c, {zeros, last_number, as_it_left_them},
                 [&](const Case& one, Dtype dtype, const Inputs& in, const Numbers& grad, int found) {
                   return run_finishing(one, dtype, in, grad, *finishing(strategy, one, dtype, kCluster), Flags{found});
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
            reached["pipelined"] >= 30 && reached["halves"] >= 8 && reached["single-block, sums inside"] >= 10 &&
            reached["cluster-resident, sums inside"] >= 10,
        "the strategies that the cases reach");
  for (const ChannelCase& c : channel_cases()) check_channels(c, run_channels);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
