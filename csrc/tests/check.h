// What a test counts as a failure.
#pragma once

#include <cstdio>
#include <string>

namespace divnorm::tests {

inline int failures = 0;

inline void check(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

}  // namespace divnorm::tests
