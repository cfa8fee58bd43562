// What a call computes: sizes, layout and fields, with no pointer into a tensor. Shared by every native backend.
#pragma once

#include <cstdint>
#include <limits>

namespace divnorm {

enum class Dtype : int { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// That of sums, statistics and maps.
constexpr Dtype compute_dtype(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

enum class Direction { forward, backward };

// What is computed of a call by whole fields. Forward's first half writes mean and variance alone, and the second reads
// mean and rstd. Backward's first half makes the sums and the parameters' gradients, and the second the others by the
// slopes.
enum class Part { both, first, second };

// What stands behind the norm. tlu: max(z, threshold); gelu is that of the error function, gelu_tanh its approximation.
enum class Activation : int { none, relu, tlu, silu, gelu, gelu_tanh };

// By which p = 1 makes s the standard deviation of a normal v: c_1 = sqrt(pi/2), c_2 = 1.
constexpr double deviation_scale(int p) { return p == 1 ? 1.2533141373155002512 : 1; }

constexpr int kAxes = 3;  // spatial axes, outermost first; where there are fewer, those in the middle have extent 1

// One averaging field. The field of position p covers p-lo..p+hi on each axis, clipped to the image.
struct Field {
  bool present = false;
  int64_t lo[kAxes] = {0, 0, 0};
  int64_t hi[kAxes] = {0, 0, 0};
  int64_t divisor[kAxes] = {0, 0, 0};  // 0: the positions inside the image
};

struct Problem {
  Dtype dtype = Dtype::float32;
  bool channels_last = false;
  bool over_batch = false;
  bool affine_per_position = false;  // the (N, F) form: one weight per position of the single channel
  bool whole = false;                // every field covers all positions: a row of the maps is one number
  int p = 2;                         // exponent of the deviation: 1 or 2
  bool subtract_mean = true;         // else x stands in the numerator in place of v
  bool residual = false;             // one is added before the activation
  Activation activation = Activation::none;
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t groups = 1;
  int64_t extent[kAxes] = {1, 1, 1};
  Field summation;    // A of the definition
  Field suppression;  // B of the definition

  int64_t positions() const { return extent[0] * extent[1] * extent[2]; }
  // Flattened, of the first number of line h of outer row i.
  int64_t position(int64_t i, int64_t h) const { return (i * extent[1] + h) * extent[2]; }
  int64_t group_channels() const { return channels / groups; }
  int64_t numel() const { return batch * channels * positions(); }
  int64_t map_batch() const { return over_batch ? 1 : batch; }
  int64_t map_rows() const { return map_batch() * groups; }
  Dtype compute() const { return compute_dtype(dtype); }
  int64_t map_bytes() const { return map_rows() * (whole ? 1 : positions()) * bytes_of(compute()); }
  // Whether x itself stands in the numerator where v is another number.
  bool keeps_mean() const { return !subtract_mean && summation.present; }
  // What backward computes: without an activation no residual comes into it, whose gradient is dy.
  Problem in_backward() const {
    Problem problem = *this;
    problem.residual = residual && activation != Activation::none;
    return problem;
  }
  // Below it y ends; a NaN, below which nothing is, where y has no end.
  template <class A>
  A floor() const {
    return activation == Activation::relu ? A(0) : std::numeric_limits<A>::quiet_NaN();
  }
  int64_t affine_size() const { return affine_per_position ? positions() : channels; }
};

// The problem with its fields clipped to the image; throws std::invalid_argument where it is none. A problem is kept
// for long and holds nothing that grows with the extents.
Problem checked(Problem problem);

// A parameter or a parameter's gradient: its own dtype, and one element or one per channel, feature or group.
struct Parameter {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t count = 0;
};

// Maps (mean, rstd) have shape (map_batch, groups, positions), one position where fields are whole, in float64 for
// float64 input and float32 otherwise; a map whose field is absent is null. variance, one more of them, is q without
// |sigma|^p, for p = 1 its square; null: not wanted. Only whole fields have it. The residual, of x's shape and layout,
// is there where the problem says so; the threshold, as weight, with Activation::tlu.
struct ForwardTensors {
  const void* x = nullptr;
  const void* residual = nullptr;
  Parameter weight, bias, sigma, threshold;
  void* y = nullptr;
  void* mean = nullptr;
  void* rstd = nullptr;
  void* variance = nullptr;
  double* l1 = nullptr;  // null: not wanted
  Part part = Part::both;
};

// Of a problem in_backward(). dresidual, of x's shape and layout: the residual's gradient. Of a half alone: sums,
// (3, rows), of g, of g times the numerator and, where dl1 is not zero, of the signs of v, where g is weight times the
// gradient in front of the activation; slopes, (2, rows), by which dx = (g - slope v) rstd - shift. Both in the type of
// the statistics.
struct BackwardTensors {
  const void* x = nullptr;
  const void* dy = nullptr;
  const void* residual = nullptr;
  const void* mean = nullptr;
  const void* rstd = nullptr;
  Parameter weight, bias, sigma, threshold;  // bias: of use where there is an activation
  double dl1 = 0.0;
  void* dx = nullptr;
  void* dresidual = nullptr;                     // null: not wanted
  Parameter dweight, dbias, dsigma, dthreshold;  // data null: not wanted
  Part part = Part::both;
  void* sums = nullptr;
  const void* slopes = nullptr;
};

}  // namespace divnorm
