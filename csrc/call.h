// What Python calls for a normalization: see call.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace divnorm {

// Adds the type Call, and the two functions that torch's autograd calls for it.
void bind_call(pybind11::module_& module);

}  // namespace divnorm
