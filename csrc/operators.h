// The operators of torch's dispatcher that need no Python: see operators.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace divnorm {

void bind_operators(pybind11::module_& module);

}  // namespace divnorm
