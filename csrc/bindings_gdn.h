// Python's calls of what stands around generalized divisive normalization's products (divnorm_kernels/gdn/cpu.py).
#pragma once

#include <pybind11/pybind11.h>

namespace divnorm {

// Adds the CPU's functions.
void bind_gdn(pybind11::module_& module);

}  // namespace divnorm
