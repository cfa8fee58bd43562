// The calls that a native backend is checked on.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../problem.h"

namespace divnorm::tests {

// One axis of a field, as a problem's.
struct Axis {
  int64_t lo, hi, divisor;
};
using Axes = std::array<Axis, kAxes>;

struct Case {
  std::string name;
  bool channels_last, over_batch, features;
  int64_t batch, channels, groups;
  std::array<int64_t, kAxes> extent;
  std::optional<Axes> summation, suppression;
  bool l1;
  Activation activation = Activation::none;
  bool residual = false;
  int p = 2;
  bool subtract_mean = true;

  // Whether y bends where the norm, with what is added, meets a threshold.
  bool clamps() const { return activation == Activation::relu || activation == Activation::tlu; }
  // Whether something depends on |v|, which bends at 0.
  bool bends() const { return l1 || p == 1; }

  // Whether every field averages over all positions.
  bool whole() const {
    const auto covers = [&](const std::optional<Axes>& axes) {
      for (int a = 0; axes && a < kAxes; ++a)
        if (std::min((*axes)[a].lo, (*axes)[a].hi) < extent[a] - 1 || (*axes)[a].divisor > 0) return false;
      return true;
    };
    return covers(summation) && covers(suppression);
  }
};

inline Problem problem_of(const Case& c, Dtype dtype) {
  Problem problem;
  problem.dtype = dtype;
  problem.channels_last = c.channels_last;
  problem.over_batch = c.over_batch;
  problem.affine_per_position = c.features;
  problem.activation = c.activation;
  problem.residual = c.residual;
  problem.p = c.p;
  problem.subtract_mean = c.subtract_mean;
  problem.whole = c.whole();
  problem.batch = c.batch;
  problem.channels = c.channels;
  problem.groups = c.groups;
  std::copy(c.extent.begin(), c.extent.end(), problem.extent);
  const auto fill = [](Field& field, const std::optional<Axes>& axes) {
    field.present = axes.has_value();
    for (int a = 0; axes && a < kAxes; ++a) {
      field.lo[a] = (*axes)[a].lo;
      field.hi[a] = (*axes)[a].hi;
      field.divisor[a] = (*axes)[a].divisor;
    }
  };
  fill(problem.summation, c.summation);
  fill(problem.suppression, c.suppression);
  return checked(problem);
}

inline Axes window(std::array<int64_t, kAxes> sizes, bool zero_edges = false) {
  Axes axes;
  for (int a = 0; a < kAxes; ++a) axes[a] = {(sizes[a] - 1) / 2, sizes[a] / 2, zero_edges ? sizes[a] : 0};
  return axes;
}

inline std::vector<Case> cases() {
  constexpr Activation relu = Activation::relu;
  const std::optional<Axes> none, all = window({33001, 301, 33001});
  return {
      {"one number", false, false, false, 1, 1, 1, {1, 1, 1}, window({1, 1, 1}), window({1, 1, 1}), true},
      {"image", false, false, false, 2, 6, 1, {1, 9, 13}, window({1, 5, 5}), window({1, 3, 7}), true},
      {"image, pixels", true, false, false, 2, 6, 1, {1, 9, 13}, window({1, 5, 5}), window({1, 3, 7}), true},
      {"groups", false, false, false, 2, 12, 3, {1, 7, 11}, window({1, 4, 2}), window({1, 2, 4}), false},
      {"groups, pixels", true, false, false, 2, 12, 3, {1, 7, 11}, window({1, 4, 2}), window({1, 2, 4}), false},
      {"several tiles", false, false, false, 1, 5, 1, {1, 40, 61}, window({1, 11, 31}), window({1, 5, 5}), false},
      {"several tiles, pixels", true, false, false, 1, 35, 1, {1, 40, 61}, window({1, 9, 9}), window({1, 5, 5}), true},
      {"volume, zero edges", false, false, false, 2, 3, 1, {4, 5, 6}, window({3, 2, 5}, true), window({1, 3, 3}), true},
      // mirrored, as backward needs them, they reach further on the other side
      {"even windows", false, false, false, 1, 1, 1, {1, 4, 6}, window({1, 2, 3}), window({2, 2, 9}), true},
      {"even, large", false, false, false, 3, 5, 1, {1, 5, 6}, window({8, 2, 9}), window({10, 9, 8}), true},
      {"even, edges", false, false, false, 3, 6, 2, {1, 4, 6}, window({8, 1, 3}, true), window({2, 2, 9}, true), true},
      {"larger than the image", true, false, false, 1, 8, 2, {3, 4, 5}, window({9, 30, 4}), window({2, 3, 40}), false},
      {"ReLU", false, false, false, 2, 6, 1, {1, 9, 13}, window({1, 5, 5}), window({1, 3, 7}), false, relu},
      {"ReLU, pixels", true, false, false, 2, 12, 3, {1, 7, 11}, window({1, 4, 2}), window({1, 2, 4}), true, relu},
      {"ReLU, features", false, false, true, 3, 1, 1, {1, 1, 37}, window({1, 1, 9}), none, false, relu},
      {"whole planes", false, false, false, 3, 6, 2, {1, 5, 7}, all, all, true, relu},
      {"whole, long planes", false, false, false, 1, 2, 1, {1, 130, 131}, all, all, false},
      {"whole planes, over the batch", false, true, false, 3, 4, 4, {1, 6, 7}, all, all, false},
      {"whole pixels", true, false, false, 2, 19, 1, {1, 33, 31}, all, all, true, relu},
      {"whole pixels, no mean", true, false, false, 2, 12, 4, {2, 3, 5}, none, all, false},
      {"whole pixels, over the batch", true, true, false, 5, 12, 12, {1, 6, 7}, all, all, true},
      {"whole, one pixel", true, false, false, 70, 18, 3, {1, 1, 1}, all, all, false, relu},
      {"whole features", false, false, true, 3, 1, 1, {1, 1, 16500}, all, all, true, relu},
      {"whole features, over the batch", false, true, true, 35, 1, 1, {1, 1, 21}, all, none, true},
      {"over the batch, pixels", true, true, false, 3, 4, 2, {1, 6, 7}, window({1, 3, 3}), window({1, 5, 5}), true},
      {"features", false, false, true, 70, 1, 1, {1, 1, 37}, window({1, 1, 9}), window({1, 1, 12}), true},
      {"mean only", false, false, false, 2, 4, 1, {1, 1, 33}, window({1, 1, 5}), none, true},
      {"no mean", true, false, false, 2, 19, 1, {1, 1, 33}, none, window({1, 1, 5}), false},
      {"neither", false, false, false, 2, 4, 2, {1, 3, 5}, none, none, true},
  };
}

// Cases of the above with what else stands behind and inside the norm, each once in every kind of kernel.
inline std::vector<Case> family_cases() {
  constexpr Activation linear = Activation::none, relu = Activation::relu, tlu = Activation::tlu;
  constexpr Activation silu = Activation::silu, gelu = Activation::gelu, gelu_tanh = Activation::gelu_tanh;
  const struct {
    const char* of;
    Activation activation;
    bool residual;
    int p;
    bool subtract_mean;
  } changes[] = {
      {"image", silu, false, 2, true},
      {"groups", gelu, false, 2, true},
      {"groups, pixels", gelu_tanh, false, 2, true},
      {"over the batch, pixels", gelu, false, 2, true},
      {"features", silu, false, 2, true},
      {"whole planes", gelu, false, 2, true},
      {"whole pixels", silu, false, 2, true},
      {"whole planes, over the batch", gelu_tanh, false, 2, true},
      {"whole features", silu, false, 2, true},
      // residuals and thresholds
      {"image", linear, true, 2, true},
      {"groups", relu, true, 2, true},
      {"groups, pixels", tlu, true, 2, true},
      {"image, pixels", silu, true, 2, true},
      {"over the batch, pixels", tlu, false, 2, true},
      {"features", tlu, true, 2, true},
      {"ReLU, features", gelu, true, 2, true},
      {"no mean", tlu, false, 2, true},
      {"whole planes", relu, true, 2, true},
      {"whole planes, over the batch", linear, true, 2, true},
      {"whole pixels", tlu, true, 2, true},
      {"whole pixels, over the batch", relu, true, 2, true},
      {"whole, one pixel", tlu, false, 2, true},
      {"whole features", tlu, true, 2, true},
      // the exponent
      {"image", linear, false, 1, true},
      {"groups, pixels", relu, true, 1, true},
      {"several tiles", silu, false, 1, true},
      {"several tiles, pixels", linear, false, 1, true},
      {"even, edges", linear, false, 1, true},
      {"over the batch, pixels", linear, false, 1, true},
      {"features", linear, false, 1, true},
      {"mean only", linear, false, 1, true},
      {"no mean", linear, false, 1, true},
      {"whole planes", tlu, false, 1, true},
      {"whole, long planes", linear, false, 1, true},
      {"whole planes, over the batch", linear, false, 1, true},
      {"whole pixels, over the batch", relu, true, 1, true},
      {"whole pixels, no mean", linear, false, 1, true},
      {"whole features", linear, false, 1, true},
      {"whole features, over the batch", linear, false, 1, true},
      // x in the numerator
      {"image", linear, false, 2, false},
      {"groups, pixels", relu, true, 2, false},
      {"even, edges", linear, false, 2, false},
      {"over the batch, pixels", gelu, false, 1, false},
      {"features", linear, false, 1, false},
      {"mean only", linear, false, 2, false},
      {"no mean", linear, false, 2, false},
      {"whole planes", linear, false, 2, false},
      {"whole planes, over the batch", tlu, true, 1, false},
      {"whole pixels, over the batch", linear, false, 2, false},
      {"whole features", linear, false, 1, false},
  };
  std::vector<Case> all;
  for (const auto& change : changes)
    for (Case c : cases()) {
      if (c.name != change.of) continue;
      c.activation = change.activation;
      c.residual = change.residual;
      c.p = change.p;
      c.subtract_mean = change.subtract_mean;
      const char* activations[] = {"", ", relu", ", tlu", ", silu", ", gelu", ", gelu_tanh"};
      c.name += activations[static_cast<int>(c.activation)];
      c.name += std::string(c.residual ? ", residual" : "") + (c.p == 1 ? ", p = 1" : "");
      c.name += c.subtract_mean ? "" : ", x kept";
      all.push_back(c);
    }
  return all;
}

}  // namespace divnorm::tests
