// Python's calls of the halves of a normalization by whole fields (divnorm_kernels/seam/cpu.py).
#pragma once

#include <pybind11/pybind11.h>

namespace divnorm {

// Adds the CPU's functions.
void bind_seam(pybind11::module_& module);

}  // namespace divnorm
