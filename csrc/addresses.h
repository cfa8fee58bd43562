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

// The maps of the fields that are there, mean first, one after the other; last the variance, where it is asked for.
struct Maps {
  Maps(const Problem& problem, Address address, bool with_variance = false) {
    const auto next = [&](bool present) -> void* {
      if (!present) return nullptr;
      const Address here = address;
      address += problem.map_bytes();
      return at<void>(here);
    };
    mean = next(problem.summation.present);
    rstd = next(problem.suppression.present);
    variance = next(with_variance);
  }
  void *mean, *rstd, *variance;
};

}  // namespace divnorm
