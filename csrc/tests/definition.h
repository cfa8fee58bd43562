// The definition evaluated by plain loops, and what a native backend is checked with: tensors, slopes.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cases.h"
#include "check.h"

namespace divnorm::tests {

using Numbers = std::vector<double>;

// The average over the field around each position of one map.
inline Numbers field_average(const Case& c, const Axes& axes, const Numbers& map) {
  if (c.whole()) return Numbers(map.size(), std::accumulate(map.begin(), map.end(), 0.0) / map.size());
  Numbers out(map.size());
  const auto& [depth, height, width] = c.extent;
  const auto inside = [](const Axis& axis, int64_t p, int64_t extent) {
    return std::pair(std::max<int64_t>(p - axis.lo, 0), std::min(p + axis.hi, extent - 1));
  };
  const auto divisor = [](const Axis& axis, std::pair<int64_t, int64_t> range) {
    return static_cast<double>(axis.divisor > 0 ? axis.divisor : range.second - range.first + 1);
  };
  for (int64_t d = 0; d < depth; ++d)
    for (int64_t h = 0; h < height; ++h)
      for (int64_t w = 0; w < width; ++w) {
        const auto ds = inside(axes[0], d, depth), hs = inside(axes[1], h, height), ws = inside(axes[2], w, width);
        double sum = 0;
        for (int64_t i = ds.first; i <= ds.second; ++i)
          for (int64_t j = hs.first; j <= hs.second; ++j)
            for (int64_t k = ws.first; k <= ws.second; ++k) sum += map[(i * height + j) * width + k];
        out[(d * height + h) * width + w] = sum / divisor(axes[0], ds) / divisor(axes[1], hs) / divisor(axes[2], ws);
      }
  return out;
}

struct Inputs {
  Numbers x, weight, bias, sigma, residual, threshold;
};

struct Shape {
  explicit Shape(const Case& c)
      : positions(c.extent[0] * c.extent[1] * c.extent[2]),
        n(c.channels / c.groups),
        numel(c.batch * c.channels * positions),
        affine(c.features ? positions : c.channels),
        maps((c.over_batch ? 1 : c.batch) * c.groups * (c.whole() ? 1 : positions)) {}
  int64_t positions, n, numel, affine, maps;

  int64_t at(const Case& c, int64_t sample, int64_t channel, int64_t position) const {
    return c.channels_last ? (sample * positions + position) * c.channels + channel
                           : (sample * c.channels + channel) * positions + position;
  }
};

inline double activated(Activation activation, double z, double threshold) {
  switch (activation) {
    case Activation::relu: return std::max(z, 0.0);
    case Activation::tlu: return std::max(z, threshold);
    case Activation::silu: return z / (1 + std::exp(-z));
    case Activation::gelu: return z * std::erfc(-z / std::sqrt(2.0)) / 2;
    case Activation::gelu_tanh:
      return z * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (z + 0.044715 * z * z * z))) / 2;
    default: return z;
  }
}

// The definition: y, and l1 as the last number.
inline Numbers evaluate(const Case& c, const Inputs& in) {
  const Shape shape(c);
  Numbers y(shape.numel + 1, 0.0);
  const int64_t units = c.over_batch ? 1 : c.batch, samples = c.over_batch ? c.batch : 1;
  for (int64_t unit = 0; unit < units; ++unit)
    for (int64_t group = 0; group < c.groups; ++group) {
      const auto each = [&](const std::function<void(int64_t, int64_t, int64_t)>& body) {
        for (int64_t s = unit * samples; s < (unit + 1) * samples; ++s)
          for (int64_t ch = group * shape.n; ch < (group + 1) * shape.n; ++ch)
            for (int64_t p = 0; p < shape.positions; ++p) body(ch, p, shape.at(c, s, ch, p));
      };
      const double share = 1.0 / static_cast<double>(shape.n * samples);
      Numbers mu(shape.positions, 0.0), s(shape.positions, 1.0);
      if (c.summation) {
        each([&](int64_t, int64_t p, int64_t i) { mu[p] += in.x[i] * share; });
        mu = field_average(c, *c.summation, mu);
      }
      if (c.suppression) {
        Numbers q(shape.positions, 0.0);
        each([&](int64_t, int64_t p, int64_t i) {
          q[p] += std::pow(deviation_scale(c.p) * std::fabs(in.x[i] - mu[p]), c.p) * share;
        });
        q = field_average(c, *c.suppression, q);
        for (int64_t p = 0; p < shape.positions; ++p)
          s[p] = std::pow(std::pow(std::fabs(in.sigma[group]), c.p) + q[p], 1.0 / c.p);
      }
      each([&](int64_t ch, int64_t p, int64_t i) {
        const double v = in.x[i] - mu[p];
        const int64_t parameter = c.features ? p : ch;
        const double numerator = c.subtract_mean ? v : in.x[i];
        y[i] = in.weight[parameter] * numerator / s[p] + in.bias[parameter];
        if (c.residual) y[i] += in.residual[i];
        y[i] = activated(c.activation, y[i], in.threshold[parameter]);
        y[shape.numel] += std::fabs(v) / static_cast<double>(shape.numel);
      });
    }
  return y;
}

// How far the results are from where they have no slope: the smallest |v| where it counts, and distance to a threshold.
inline double smallest_deviation(Case c, Inputs in) {
  double smallest = INFINITY;
  const auto look = [&] {
    const Numbers y = evaluate(c, in);  // and l1
    for (size_t i = 0; i + 1 < y.size(); ++i) smallest = std::min(smallest, std::fabs(y[i]));
  };
  if (c.clamps()) {
    for (size_t i = 0; c.activation == Activation::tlu && i < in.bias.size(); ++i) in.bias[i] -= in.threshold[i];
    c.activation = Activation::none;
    look();
  }
  if (!c.bends()) return smallest;
  c.activation = Activation::none;
  c.residual = false;
  c.subtract_mean = true;
  c.suppression.reset();
  std::fill(in.weight.begin(), in.weight.end(), 1.0);
  std::fill(in.bias.begin(), in.bias.end(), 0.0);
  look();
  return smallest;
}

// Memory of exactly the tensor's bytes at the tensor's own alignment, so that one byte too far is found.
class Tensor {
 public:
  Tensor(Dtype dtype, int64_t count) : dtype_(dtype), count_(count), bytes_(new unsigned char[count * size()]) {
    std::memset(bytes_.get(), 0xff, count * size());  // NaN in every type
  }
  Tensor(Dtype dtype, const Numbers& numbers) : Tensor(dtype, static_cast<int64_t>(numbers.size())) {
    for (int64_t i = 0; i < count_; ++i) set(i, numbers[i]);
  }
  void* data() { return bytes_.get(); }
  size_t size() const { return dtype_ == Dtype::float64 ? 8 : dtype_ == Dtype::float32 ? 4 : 2; }
  Parameter parameter() { return {data(), dtype_, count_}; }
  bool same_bits(const Tensor& other) const {
    return std::memcmp(bytes_.get(), other.bytes_.get(), count_ * size()) == 0;
  }

  Numbers numbers() const {
    Numbers out(count_);
    for (int64_t i = 0; i < count_; ++i) out[i] = get(i);
    return out;
  }

 private:
  double get(int64_t i) const {
    const unsigned char* p = bytes_.get() + i * size();
    if (dtype_ == Dtype::float64) return read<double>(p);
    if (dtype_ == Dtype::float32) return read<float>(p);
    const uint32_t bits = read<uint16_t>(p);
    if (dtype_ == Dtype::bfloat16) {
      const uint32_t wide = bits << 16;
      return read<float>(reinterpret_cast<const unsigned char*>(&wide));
    }
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const double fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return fraction == 0 ? sign * INFINITY : NAN;
    return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
  }

  // The half types receive numbers they hold exactly: multiples of 1/16 of a small size.
  void set(int64_t i, double value) {
    unsigned char* p = bytes_.get() + i * size();
    if (dtype_ == Dtype::float64) return write(p, value);
    const float single = static_cast<float>(value);
    if (dtype_ == Dtype::float32) return write(p, single);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    if (dtype_ == Dtype::bfloat16) return write(p, static_cast<uint16_t>(bits >> 16));
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t half = magnitude == 0 ? 0 : (magnitude >> 13) - (112u << 10);
    write(p, static_cast<uint16_t>(half | bits >> 31 << 15));
  }

  template <class V>
  static V read(const unsigned char* p) {
    V value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  template <class V>
  static void write(unsigned char* p, V value) {
    std::memcpy(p, &value, sizeof value);
  }

  Dtype dtype_;
  int64_t count_;
  std::unique_ptr<unsigned char[]> bytes_;
};

// Largest difference relative to the largest number; a NaN on one side only is infinitely far.
inline double distance(const Numbers& got, const Numbers& expected) {
  double worst = 0, scale = 1;
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(got[i])) return INFINITY;
    worst = std::max(worst, std::fabs(got[i] - expected[i]));
    scale = std::max(scale, std::fabs(expected[i]));
  }
  return worst / scale;
}

struct Results {
  Tensor y, mean, rstd, dx, dweight, dbias, dsigma, dresidual, dthreshold;
  double l1 = 0;
};

constexpr double kL1Weight = 3.0;

inline double loss(const Case& c, const Inputs& in, const Numbers& grad) {
  const Numbers y = evaluate(c, in);
  double sum = c.l1 ? kL1Weight * y.back() : 0;
  for (size_t i = 0; i < grad.size(); ++i) sum += y[i] * grad[i];
  return sum;
}

// The slope of the loss along a direction in one of the inputs, against the gradient's.
inline void check_slope(const std::string& where, const Case& c, Inputs in, Numbers Inputs::* which,
                        const Numbers& grad, const Numbers& gradient, std::mt19937& random) {
  const Numbers base = in.*which;
  constexpr double kStep = 0x1p-18;  // |v| bends at 0: small enough that no v in a sample changes sign
  Numbers direction(base.size());
  double expected = 0, scale = 1;
  for (size_t i = 0; i < base.size(); ++i) {
    direction[i] = std::uniform_real_distribution<>(-1, 1)(random);
    expected += direction[i] * gradient[i];
    scale += std::fabs(direction[i] * gradient[i]);
  }
  const auto shifted = [&](double step) {
    for (size_t i = 0; i < base.size(); ++i) (in.*which)[i] = base[i] + step * direction[i];
    return loss(c, in, grad);
  };
  const double slope = (shifted(kStep) - shifted(-kStep)) / (2 * kStep);
  check(std::fabs(slope - expected) < 1e-6 * scale, where);
}

// Every result of a case, in every dtype, and the same bits again from each of `others`. run(case, dtype, inputs,
// gradient of y, other) computes it; other 0 is the first run.
template <class Run>
void check_case(const std::string& who, const Case& c, const std::vector<int>& others, Run&& run) {
  std::mt19937 random(20170424);
  const auto sixteenths = [&](int64_t count, int low, int high) {
    Numbers out(count);
    for (double& value : out) value = std::uniform_int_distribution<>(low, high)(random) / 16.0;
    return out;
  };
  const Shape shape(c);
  Inputs in{sixteenths(shape.numel, -60, 60), sixteenths(shape.affine, -30, 30), sixteenths(shape.affine, -30, 30),
            sixteenths(c.groups, 8, 32),      sixteenths(shape.numel, -30, 30),  sixteenths(shape.affine, -16, 16)};
  if (c.clamps())  // off the points where there is no slope
    for (double& value : in.bias) value += 1 / 32.0;
  // Where v is 0 but for rounding, |v| has no gradient to compare. With a single number v is 0 exactly, every time.
  for (int attempt = 0; (c.bends() || c.clamps()) && attempt < 100 && smallest_deviation(c, in) < 1e-6; ++attempt)
    in.x = sixteenths(shape.numel, -60, 60);
  const Numbers grad = sixteenths(shape.numel, -30, 30);
  const std::string where = who + ": " + c.name + ": ";

  const Numbers expected = evaluate(c, in);
  const Results exact = run(c, Dtype::float64, in, grad, 0);
  check(distance(exact.y.numbers(), expected) < 1e-12, where + "y");
  if (c.l1) check(std::fabs(exact.l1 - expected.back()) < 1e-12 * (1 + expected.back()), where + "l1");
  Inputs slopes = in;
  if (c.bends())  // off the points where |v| has no slope
    for (double& value : slopes.x) value += std::uniform_real_distribution<>(0.005, 0.03)(random);
  const Results smooth = run(c, Dtype::float64, slopes, grad, 0);
  check_slope(where + "dx", c, slopes, &Inputs::x, grad, smooth.dx.numbers(), random);
  check_slope(where + "dweight", c, slopes, &Inputs::weight, grad, smooth.dweight.numbers(), random);
  check_slope(where + "dbias", c, slopes, &Inputs::bias, grad, smooth.dbias.numbers(), random);
  check_slope(where + "dsigma", c, slopes, &Inputs::sigma, grad, smooth.dsigma.numbers(), random);
  const bool dresidual = c.residual && c.activation != Activation::none, dthreshold = c.activation == Activation::tlu;
  if (dresidual)
    check_slope(where + "dresidual", c, slopes, &Inputs::residual, grad, smooth.dresidual.numbers(), random);
  if (dthreshold)
    check_slope(where + "dthreshold", c, slopes, &Inputs::threshold, grad, smooth.dthreshold.numbers(), random);

  // A sum of `depth` numbers rounds at most that often; the outputs round once more, in their own type.
  const double depth = static_cast<double>(shape.numel + 64);
  const struct {
    Dtype dtype;
    double epsilon;
    const char* name;
  } types[] = {{Dtype::float32, 0x1p-23, "float32"},
               {Dtype::bfloat16, 0x1p-8, "bfloat16"},
               {Dtype::float16, 0x1p-11, "float16"}};
  for (const auto& type : types) {
    const Results r = run(c, type.dtype, in, grad, 0);
    const double sums = std::sqrt(depth) * 16 * 0x1p-23;
    check(distance(r.y.numbers(), expected) < type.epsilon + sums, where + "y in " + type.name);
    check(distance(r.dx.numbers(), exact.dx.numbers()) < type.epsilon + sums, where + "dx in " + type.name);
    check(distance(r.dweight.numbers(), exact.dweight.numbers()) < sums, where + "dweight in " + type.name);
    check(distance(r.dbias.numbers(), exact.dbias.numbers()) < sums, where + "dbias in " + type.name);
    check(distance(r.dsigma.numbers(), exact.dsigma.numbers()) < sums, where + "dsigma in " + type.name);
    if (dresidual)
      check(distance(r.dresidual.numbers(), exact.dresidual.numbers()) < type.epsilon + sums,
            where + "dresidual in " + type.name);
    if (dthreshold)
      check(distance(r.dthreshold.numbers(), exact.dthreshold.numbers()) < sums, where + "dthreshold in " + type.name);
    for (const int other : others) {
      const Results again = run(c, type.dtype, in, grad, other);
      check(r.y.same_bits(again.y) && r.dx.same_bits(again.dx) && r.dweight.same_bits(again.dweight) &&
                r.dbias.same_bits(again.dbias) && r.dsigma.same_bits(again.dsigma) && r.l1 == again.l1 &&
                r.dresidual.same_bits(again.dresidual) && r.dthreshold.same_bits(again.dthreshold),
            where + "bits of run " + std::to_string(other) + " in " + type.name);
    }
  }
}

}  // namespace divnorm::tests
