// What ends a backward: partial sums become the parameters' gradients. And what calls of either kind go by.
#pragma once

#include "lanes.h"
#include "parameters.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kThreadGrain = 16384;             // elements that are worth waking a thread
constexpr int64_t kStreamBytes = int64_t{8} << 20;  // outputs from here on bypass the cache, which x and dy need

// Sums the rows of (rows, count) partials into a parameter's gradient, whose number i is at place(i).
template <class P, class Place>
void sum_partials(const P* partials, int64_t rows, int64_t count, Place&& place, const Parameter& out) {
  if (out.data == nullptr) return;
  Buffer<double> sums(count, true);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < count; ++i) sums.data()[i] += partials[row * count + i];
  for (int64_t i = 0; i < count; ++i) write_number(out, i, sums.data()[place(i)]);
}

inline void finish_dsigma(const Problem& problem, const BackwardTensors& tensors, const double* partials,
                          int64_t rows) {
  if (tensors.dsigma.data == nullptr) return;
  const Values<double> sigma(tensors.sigma, problem.groups, 0);
  Buffer<double> sums(problem.groups, true);
  for (int64_t row = 0; problem.suppression.present && row < rows; ++row)
    for (int64_t g = 0; g < problem.groups; ++g) {
      const double value = sigma.data()[g];
      sums.data()[g] -= (problem.p == 1 ? sign(value) : value) * partials[row * problem.groups + g];
    }
  if (tensors.dsigma.count == 1)
    for (int64_t g = 1; g < problem.groups; ++g) sums.data()[0] += sums.data()[g];
  for (int64_t g = 0; g < tensors.dsigma.count; ++g) write_number(tensors.dsigma, g, sums.data()[g]);
}

}  // namespace divnorm::DIVNORM_ISA
