// Cases of channel normalizations, and their results against the definition by plain loops in float64.
#pragma once

#include <memory>
#include <random>

#include "../channels.h"
#include "definition.h"

namespace divnorm::tests {

struct ChannelCase {
  std::string name;
  ChannelProblem problem;  // its dtype aside
  double numbers[kScalars];
  int block_shared_bytes;
};

inline std::vector<ChannelCase> channel_cases() {
  const auto problem = [](int64_t outer, int64_t channels, int64_t inner, int64_t before, int64_t after, bool squared) {
    return ChannelProblem{Dtype::float64, outer, channels, inner, before < 0, before, after, squared};
  };
  constexpr int kRoom = 4000, kNone = 600;
  return {{"channels, box", problem(3, 13, 21, 2, 1, false), {1.5, 0.25, 0.75, 0}, kRoom},
          {"channels, long box", problem(11, 37, 1, 5, 30, true), {1.5, 0.25, 0.5, 0}, kRoom},
          {"channels, exponential", problem(5, 70, 3, -1, 0, true), {1.5, 0.25, 1.25, 0.875}, kRoom},
          {"channels, far", problem(17, 90, 1, 9, 0, false), {1.5, 0.25, 1, 0}, kNone},
          {"channels, far and exponential", problem(2, 90, 9, -1, 0, false), {1.5, 0.25, 0.5, 0.5}, kNone}};
}

inline Numbers evaluate(const ChannelCase& c, const Numbers& x, const double (&numbers)[kScalars]) {
  const ChannelProblem& p = c.problem;
  const auto at = [&](int64_t o, int64_t channel, int64_t i) { return (o * p.channels + channel) * p.inner + i; };
  Numbers y(x.size());
  for (int64_t o = 0; o < p.outer; ++o)
    for (int64_t i = 0; i < p.inner; ++i)
      for (int64_t channel = 0; channel < p.channels; ++channel) {
        double sum = 0;
        for (int64_t other = 0; other < p.channels; ++other) {
          const int64_t ahead = other - channel;
          const double weight =
              p.exponential ? std::pow(numbers[kScalarRho], std::abs(ahead)) : (ahead >= -p.before && ahead <= p.after);
          sum += weight * x[at(o, other, i)] * x[at(o, other, i)];
        }
        const double n = x[at(o, channel, i)];
        y[at(o, channel, i)] =
            (p.squared ? n * n : n) * std::pow(numbers[kScalarK] + numbers[kScalarA] * sum, -numbers[kScalarBeta]);
      }
  return y;
}

struct ChannelResults {
  Numbers y, dx, dlearned;
};

// With all four numbers learned, but a box's rho: forward(call) and backward(call) of a problem.
template <class Forward, class Backward>
ChannelResults run(const ChannelCase& c, const ChannelProblem& problem, const Numbers& x, const Numbers& grad,
                   Forward&& forward, Backward&& backward) {
  Tensor tensor(problem.dtype, x), dy(problem.dtype, grad);
  Tensor y(problem.dtype, problem.numel()), dx(problem.dtype, problem.numel());
  Tensor learned(problem.compute(), Numbers(c.numbers, c.numbers + kScalars)), dlearned(problem.compute(), kScalars);
  ChannelScalars scalars;
  for (int i = 0; i < kScalars; ++i) scalars.value[i] = problem.exponential || i != kScalarRho ? NAN : 0;
  scalars.learned = learned.data();
  forward(ChannelForward{tensor.data(), scalars, y.data()});
  backward(ChannelBackward{tensor.data(), dy.data(), scalars, dx.data(), dlearned.data()});
  return {y.numbers(), dx.numbers(), dlearned.numbers()};
}

// y, and the gradients by the slope of the loss along a direction; run(case, dtype, x, grad) has the results.
template <class Run>
void check_channels(const ChannelCase& c, Run&& run) {
  std::mt19937 random(20170424);
  const auto sixteenths = [&] {
    Numbers out(c.problem.numel());
    for (double& value : out) value = std::uniform_int_distribution<>(-40, 40)(random) / 16.0;
    return out;
  };
  const Numbers x = sixteenths(), grad = sixteenths(), expected = evaluate(c, x, c.numbers);
  const ChannelResults exact = run(c, Dtype::float64, x, grad);
  check(distance(exact.y, expected) < 1e-13, c.name + ": y");
  constexpr double kStep = 0x1p-18;
  const Numbers direction = sixteenths();
  const auto slope = [&](double in_x, int number) {
    const auto loss = [&](double step) {
      Numbers moved = x;
      for (size_t i = 0; i < x.size(); ++i) moved[i] += in_x * step * direction[i];
      double numbers[kScalars];
      for (int i = 0; i < kScalars; ++i) numbers[i] = c.numbers[i] + (i == number ? step : 0);
      const Numbers y = evaluate(c, moved, numbers);
      return std::inner_product(y.begin(), y.end(), grad.begin(), 0.0);
    };
    return (loss(kStep) - loss(-kStep)) / (2 * kStep);
  };
  const double along = std::inner_product(direction.begin(), direction.end(), exact.dx.begin(), 0.0);
  const double scale = static_cast<double>(x.size());
  check(std::fabs(along - slope(1, -1)) < 1e-8 * scale, c.name + ": dx");
  for (int i = 0; i < kScalars; ++i)
    check(std::fabs(exact.dlearned[i] - slope(0, i)) < 1e-8 * scale, c.name + ": number " + std::to_string(i));
  const struct {
    Dtype dtype;
    double epsilon;
  } types[] = {{Dtype::float32, 0x1p-23}, {Dtype::bfloat16, 0x1p-8}, {Dtype::float16, 0x1p-11}};
  for (const auto& type : types) {
    const ChannelResults r = run(c, type.dtype, x, grad);
    const double sums = static_cast<double>(c.problem.channels + 8) * 0x1p-23;
    check(distance(r.y, expected) < type.epsilon + sums, c.name + ": y of " + std::to_string(type.epsilon));
    check(distance(r.dx, exact.dx) < type.epsilon + 3 * sums, c.name + ": dx of " + std::to_string(type.epsilon));
  }
}

}  // namespace divnorm::tests
