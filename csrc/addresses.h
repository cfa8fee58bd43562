// Addresses from Python as the kernels' tensors.
#pragma once

#include "problem.h"

namespace divnorm {

using Address = uintptr_t;

template <class Pointee>
Pointee* at(Address address) {
  return reinterpret_cast<Pointee*>(address);
}

// A parameter by its address; address 0: there is none.
inline Parameter parameter(Address address, int dtype, int64_t count) {
  return {at<void>(address), static_cast<Dtype>(dtype), count};
}

// The maps of the fields that are there, mean first, one after the other.
struct Maps {
  Maps(const Problem& problem, Address address)
      : mean(problem.summation.present ? at<void>(address) : nullptr),
        rstd(problem.suppression.present ? at<void>(address + (mean == nullptr ? 0 : problem.map_bytes())) : nullptr) {}
  void *mean, *rstd;
};

}  // namespace divnorm
