// Python's calls of the halves of a normalization by whole fields (divnorm_kernels/seam): addresses, and what stands
// beside them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "address.h"
#include "problem.h"

namespace divnorm {

using RowPlaces = std::array<Address, 2>;                  // mean, and the variance or 1/s
using ParameterPlace = std::tuple<Address, int, int64_t>;  // where, dtype, how many
using ParameterPlaces = std::array<ParameterPlace, 3>;     // weight, bias, threshold, or their gradients

inline Parameter parameter(const ParameterPlace& place) {
  const auto [data, dtype, count] = place;
  return {written(data), static_cast<Dtype>(dtype), count};
}

template <class Tensors>
Tensors half(Part part, Address x, const ParameterPlaces& beside, Address residual) {
  Tensors tensors;
  tensors.part = part;
  tensors.x = read(x);
  tensors.residual = read(residual);
  tensors.weight = parameter(std::get<0>(beside));
  tensors.bias = parameter(std::get<1>(beside));
  tensors.threshold = parameter(std::get<2>(beside));
  return tensors;
}

// Adds the CPU's functions.
void bind_seam(pybind11::module_& module);

}  // namespace divnorm
