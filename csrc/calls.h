// Forward and backward of one problem by one backend: all that the bindings know of a backend.
#pragma once

#include "problem.h"

namespace divnorm {

// Where a call is made, and with what.
struct Place {
  int device = 0;
  uintptr_t stream = 0;
  int threads = 1;          // on the CPU
  void* scratch = nullptr;  // of Calls::scratch_bytes
};

// What a call is told; l1 and dl1 are numbers in the type of the sums, on x's device, or null.
struct ForwardCall {
  ForwardTensors tensors;  // but for l1
  double sigma_value = 0;  // where tensors.sigma is absent
  void* l1 = nullptr;
  Place place;
};

struct BackwardCall {
  BackwardTensors tensors;  // but for dl1
  double sigma_value = 0;
  const void* dl1 = nullptr;
  Place place;
};

class Calls {
 public:
  virtual ~Calls() = default;
  virtual const Problem& problem() const = 0;
  virtual int64_t scratch_bytes(Direction direction) const = 0;
  virtual void forward(const ForwardCall& call) const = 0;
  virtual void backward(const BackwardCall& call) const = 0;
};

}  // namespace divnorm
