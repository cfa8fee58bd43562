// Under ThreadSanitizer, with a thread of the system for every thread of a kernel: no strategy has a race, and a kernel
// from which any one barrier is taken away has one.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cuda_runner.h"

namespace {

using namespace divnorm;
using namespace divnorm::tests;

constexpr int kMostLaunches = 8;

struct Outcome {
  int status = 0;
  int launches = 0, barriers[kMostLaunches] = {};
};

// Runs a case in a process of its own, with a barrier of a launch left out.
Outcome outcome(const Case& c, const Setting& setting, int launch, int barrier) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  std::fflush(stdout);  // or the child writes it again
  const pid_t child = fork();
  if (child == 0) {
    if (launch >= 0) dup2(open("/dev/null", O_WRONLY), STDERR_FILENO);
    const Shape shape(c);
    const Numbers ones(shape.numel, 1.0), affine(shape.affine, 1.0), sigma(c.groups, 1.0);
    cuda::emulation::leave_out_barrier(launch, barrier);
    run(c, Dtype::float32, {ones, affine, affine, sigma}, ones, setting);
    Outcome out;
    for (const int met : cuda::emulation::barriers_met()) out.barriers[out.launches++] = met;
    if (write(ends[1], &out, sizeof out) != sizeof out) std::abort();
    std::exit(0);  // ThreadSanitizer has its say at exit
  }
  close(ends[1]);
  Outcome out;
  if (read(ends[0], &out, sizeof out) != sizeof out) out = {};
  close(ends[0]);
  waitpid(child, &out.status, 0);
  return out;
}

}  // namespace

int main() {
  const Axes small = window({1, 3, 3});
  const Case all[] = {
      {"image", false, false, false, 5, 8, 1, {1, 4, 6}, small, small, true},
      {"image, pixels", true, false, false, 5, 8, 1, {1, 4, 6}, small, small, true},
  };
  for (const char* strategy : {"single-block", "cluster-resident", "two-pass"})
    for (const Case& c : all) {
      const std::string where = std::string(strategy) + ": " + c.name;
      const auto setting = setting_for(strategy, c, Dtype::float32);
      check(setting.has_value(), where + ": a setting");
      if (!setting) continue;
      const Outcome whole = outcome(c, *setting, -1, -1);
      check(whole.status == 0, where + ": a race");
      int caught = 0, barriers = 0;
      for (int launch = 0; launch < whole.launches; ++launch)
        for (int barrier = 0; barrier < whole.barriers[launch]; ++barrier, ++barriers) {
          const bool found = outcome(c, *setting, launch, barrier).status != 0;
          caught += found;
          check(found, where + ": without barrier " + std::to_string(barrier) + " of launch " + std::to_string(launch));
        }
      std::printf("%s: %d of %d missing barriers are caught\n", where.c_str(), caught, barriers);
      check(barriers > 20, where + ": too few barriers");
    }
  return failures == 0 ? 0 : 1;
}
