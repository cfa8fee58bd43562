// A geometry of Python's (divnorm_kernels/fields.py) as a problem: the one place that reads it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "problem.h"

namespace divnorm {

// Spatial axis i of `dims`: kernels walk the first and want the last contiguous.
inline int slot_of(size_t i, size_t dims) { return i + 1 == dims ? kAxes - 1 : static_cast<int>(i); }

inline void read_field(const pybind11::object& axes, Field& field) {
  if (axes.is_none()) return;
  field.present = true;
  std::fill(field.divisor, field.divisor + kAxes, 1);
  const pybind11::tuple all(axes);
  for (size_t i = 0; i < all.size(); ++i) {
    const int slot = slot_of(i, all.size());
    field.lo[slot] = all[i].attr("lo").cast<int64_t>();
    field.hi[slot] = all[i].attr("hi").cast<int64_t>();
    field.divisor[slot] = all[i].attr("divisor").cast<int64_t>();
  }
}

inline Activation activation_of(const pybind11::object& name) {
  if (name.is_none()) return Activation::none;
  const std::string text = name.cast<std::string>();
  if (text == "relu") return Activation::relu;
  if (text == "tlu") return Activation::tlu;
  if (text == "silu") return Activation::silu;
  if (text == "gelu") return Activation::gelu;
  if (text == "gelu_tanh") return Activation::gelu_tanh;
  throw std::invalid_argument("activation: got " + text + ", which no kernel computes");
}

inline Problem problem_of(const pybind11::object& geometry, int dtype, bool channels_last, bool residual) {
  const pybind11::object norm = geometry.attr("norm");
  Problem problem;
  problem.dtype = static_cast<Dtype>(dtype);
  problem.channels_last = channels_last;
  problem.over_batch = norm.attr("over_batch").cast<bool>();
  problem.activation = activation_of(norm.attr("activation"));
  problem.p = norm.attr("p").cast<int>();
  problem.subtract_mean = norm.attr("subtract_mean").cast<bool>();
  problem.residual = residual;
  problem.groups = norm.attr("groups").cast<int64_t>();
  problem.affine_per_position = geometry.attr("features").cast<bool>();
  problem.whole = geometry.attr("whole").cast<bool>();
  problem.batch = geometry.attr("batch").cast<int64_t>();
  problem.channels = geometry.attr("channels").cast<int64_t>();
  const pybind11::tuple spatial = geometry.attr("spatial");
  for (size_t i = 0; i < spatial.size(); ++i) problem.extent[slot_of(i, spatial.size())] = spatial[i].cast<int64_t>();
  read_field(geometry.attr("summation"), problem.summation);
  read_field(geometry.attr("suppression"), problem.suppression);
  return checked(problem);
}

// The calls of a backend, from one compiled module to another.
inline pybind11::capsule capsule_of(const void* calls) { return pybind11::capsule(calls, "divnorm_kernels.Calls"); }

}  // namespace divnorm
