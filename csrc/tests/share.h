// For time: of what a test goes through it may take every so manieth alone.
#pragma once

#include <cstdlib>

namespace divnorm::tests {

// One out of as many as the environment variable DIVNORM_EVERY says, the first among them; without it all.
class Share {
 public:
  bool takes() { return number_++ % every_ == 0; }

 private:
  static int every() {
    const char* const given = std::getenv("DIVNORM_EVERY");
    return given == nullptr ? 1 : std::atoi(given);
  }

  int every_ = every(), number_ = 0;
};

}  // namespace divnorm::tests
