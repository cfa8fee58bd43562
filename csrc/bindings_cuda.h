// Adds the CUDA backend to a compiled module.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/strategy.h"

namespace divnorm {

cuda::Device device_of(const pybind11::dict& facts);

void bind_cuda(pybind11::module_& module);
void bind_channels_cuda(pybind11::module_& module);  // a part of it

}  // namespace divnorm
