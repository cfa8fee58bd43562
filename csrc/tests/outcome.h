// What becomes of a launch on the emulated device, seen from outside.
#pragma once

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>

#include "emulated_device.h"

namespace divnorm::tests {

// The exit status of a process of its own in which a word of a launch is left out, by all warps or by one.
inline int outcome_without(cuda::emulation::Word word, int launch, int index, int warp,
                           const std::function<void()>& body) {
  std::fflush(stdout);  // or the child writes it again
  const pid_t child = fork();
  if (child == 0) {
    if (launch >= 0) dup2(open("/dev/null", O_WRONLY), STDERR_FILENO);
    cuda::emulation::leave_out(word, launch, index, warp);
    body();
    std::exit(0);  // ThreadSanitizer has its say at exit
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

}  // namespace divnorm::tests
