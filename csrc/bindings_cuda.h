// Adds the CUDA backend to a compiled module.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/strategy.h"

namespace divnorm {

cuda::Device device_of(const pybind11::dict& facts);
cuda::Preferences preferences_of(const pybind11::dict& row);

void bind_cuda(pybind11::module_& module);
void bind_channels_cuda(pybind11::module_& module);  // parts of it
void bind_seam_cuda(pybind11::module_& module);

}  // namespace divnorm
