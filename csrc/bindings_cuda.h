// Adds the CUDA backend to a compiled module.
#pragma once

#include <pybind11/pybind11.h>

namespace divnorm {

void bind_cuda(pybind11::module_& module);

}  // namespace divnorm
