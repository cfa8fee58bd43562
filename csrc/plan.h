// A geometry on tensors of one dtype, memory format and device: from tensors to a backend's calls and back.
#pragma once

#include <array>
#include <vector>

#include "calls.h"
#include "torch_api.h"

namespace divnorm {

// What a call is given. Absent tensors have no address.
struct Arguments {
  torch::View x, weight, bias, sigma;
  double sigma_value = 0;  // where sigma is a number
};

// What backward is given beside them.
struct Upstream {
  torch::View dy, dl1, maps;  // dl1 absent: zero
};

// The shapes of parameters, beside those of the operator, that a call takes.
struct Leeway {
  bool any_rank = false;      // of weight and bias: any trailing shape of x with as many numbers
  bool one_in_a_row = false;  // of sigma: (1,)
};

struct Results {
  pybind11::object y, maps, l1;  // l1 is None where it was not wanted
};

using Needs = std::array<bool, 4>;                  // of the gradients of x, weight, bias and sigma
using Gradients = std::array<pybind11::object, 4>;  // None where not needed

// Tensors of Python's that backward takes.
struct Saved {
  PyObject *x, *weight, *bias, *sigma, *maps;
};

// What a plan depends on of an x.
class PlanKey {
 public:
  explicit PlanKey(const torch::View& x);
  bool operator==(const PlanKey& other) const;
  size_t hash() const;

 private:
  std::array<int64_t, torch::kMostDims> shape_;
  int ndim_;
  Dtype dtype_;
  int device_type_, device_;
  bool contiguous_;  // else channels_last
};

class Plan {
 public:
  // backend: the module of Python's that it is of; calls: of the compiled module's, or None where the backend's own
  // functions do the work. `like` is an x of the plan.
  Plan(pybind11::object geometry, pybind11::object backend, pybind11::object calls, const pybind11::object& like);

  const pybind11::object& geometry() const { return geometry_; }
  const pybind11::object& backend() const { return backend_; }
  // Whether backward reads the values of the bias.
  bool reads_bias() const { return reads_bias_; }
  // Whether calls of it run in the compiled module from one end to the other. All of the following but `forward` and
  // `backward` asks for one that do.
  bool native() const { return calls_ != nullptr; }
  const Calls& calls() const { return *calls_; }
  std::vector<int64_t> maps_shape(bool with_variance) const;
  // The dtype of sums and maps.
  Dtype compute() const { return compute_dtype(calls_->problem().dtype); }

  // Whether these are arguments for a plan, native or not, whose key is that of x.
  bool fits(const Arguments& arguments, Leeway leeway) const;
  // Whether they are, whatever x is, and with them what comes back to them.
  bool fits(const Arguments& arguments, const Upstream& upstream, Leeway leeway) const;
  // Calls on what fits, but for their place. Gradients without an address are not wanted.
  ForwardCall forward_call(const Arguments& arguments, void* y, void* maps, bool with_variance, void* l1) const;
  BackwardCall backward_call(const Arguments& arguments, const Upstream& upstream, void* dx, Parameter dweight,
                             Parameter dbias, Parameter dsigma) const;

  // Of arguments that fit, whose tensors of Python's stand beside them. With `keep_maps` the maps are a tensor; None is
  // returned in their place where nobody asks for them.
  Results forward(PyObject* x, PyObject* weight, PyObject* bias, PyObject* sigma, const Arguments& arguments,
                  bool with_l1, bool with_variance, bool keep_maps) const;

  // Whether gradients could be computed: not where a tensor is none for the plan. `dy` and `dl1` may be None: zero. Of
  // the saved, sigma may be a number, and bias None where its gradient is needed and its values are not: then the
  // gradient is of weight's shape and of `bias_dtype`.
  bool backward(PyObject* dy, PyObject* dl1, const Saved& saved, PyObject* bias_dtype, Needs needs,
                Gradients& gradients) const;

 private:
  pybind11::object make_maps(PyObject* x, const torch::View& view, bool with_variance) const;
  template <class Call>
  void point(Call& call, const Arguments& arguments, void* maps) const;

  DLDevice device_;
  pybind11::object geometry_, backend_, owner_;
  const Calls* calls_ = nullptr;
  int64_t affine_size_, groups_;
  bool reads_bias_;
  std::vector<int64_t> maps_shape_;
  // By whether the variance is among them; with the GIL.
  mutable std::array<pybind11::object, 2> maps_like_;
  mutable std::array<bool, 2> made_maps_{};
};

// Fills in the views of what Python gave; false where one of them is neither absent nor readable.
bool arguments_of(PyObject* weight, PyObject* bias, PyObject* sigma, Arguments& arguments);

}  // namespace divnorm
