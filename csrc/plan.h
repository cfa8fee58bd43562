// A geometry on tensors of one dtype, memory format and device: from tensors to a backend's calls and back.
#pragma once

#include <array>
#include <vector>

#include "calls.h"
#include "torch_api.h"

namespace divnorm {

// What a call is given. Absent tensors have no address.
struct Arguments {
  torch::View x, weight, bias, sigma, residual, threshold;
  double sigma_value = 0;  // where sigma is a number
};

// What backward is given beside them.
struct Upstream {
  torch::View dy, dl1, maps;  // dl1 absent: zero
};

// The shapes of parameters, beside those of the operator, that a call takes.
struct Leeway {
  bool any_rank = false;      // of weight, bias and threshold: any trailing shape of x with as many numbers
  bool one_in_a_row = false;  // of sigma: (1,)
};

struct Results {
  pybind11::object y, maps, l1;  // l1 is None where it was not wanted
};

// Of the gradients of x, weight, bias, sigma, residual and threshold.
using Needs = std::array<bool, 6>;
using Gradients = std::array<pybind11::object, 6>;  // None where not needed

// What Python gives for a call: tensors, but that sigma may be a number, and others than x None.
struct Given {
  PyObject *x, *weight, *bias, *sigma, *residual, *threshold;
};

// What backward takes of it, and the maps.
struct Saved {
  Given given;
  PyObject* maps;
};

// What a plan depends on of an x, and whether there is a residual.
class PlanKey {
 public:
  PlanKey(const torch::View& x, bool residual);
  bool operator==(const PlanKey& other) const;
  size_t hash() const;

 private:
  std::array<int64_t, torch::kMostDims> shape_;
  int ndim_;
  Dtype dtype_;
  int device_type_, device_;
  bool contiguous_;  // else channels_last
  bool residual_;
};

class Plan {
 public:
  // backend: the module of Python's that it is of; calls: of the compiled module's, or None where the backend's own
  // functions do the work. `like` is an x of the plan; residual: whether its calls have one.
  Plan(pybind11::object geometry, pybind11::object backend, pybind11::object calls, const pybind11::object& like,
       bool residual);

  const pybind11::object& geometry() const { return geometry_; }
  const pybind11::object& backend() const { return backend_; }
  // Whether there is an activation: backward reads the values of the bias and of the residual.
  bool activates() const { return activates_; }
  bool residual() const { return residual_; }
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
  // Calls on what fits, but for their place and backward's results.
  ForwardCall forward_call(const Arguments& arguments, void* y, void* maps, bool with_variance, void* l1) const;
  BackwardCall backward_call(const Arguments& arguments, const Upstream& upstream) const;

  // Of arguments that fit, whose tensors of Python's stand beside them. With `keep_maps` the maps are a tensor; None is
  // returned in their place where nobody asks for them.
  Results forward(const Given& given, const Arguments& arguments, bool with_l1, bool with_variance,
                  bool keep_maps) const;

  // Whether gradients could be computed: not where a tensor is none for the plan. `dy` and `dl1` may be None: zero. Of
  // the saved, bias and residual may be None where their gradients are needed and their values are not: that of the
  // bias is of weight's shape and of `bias_dtype`, that of the residual is dy.
  bool backward(PyObject* dy, PyObject* dl1, const Saved& saved, PyObject* bias_dtype, Needs needs,
                Gradients& gradients) const;

 private:
  pybind11::object make_maps(PyObject* x, const torch::View& view, bool with_variance) const;
  bool fits_parameters(const Arguments& arguments, Leeway leeway) const;
  template <class Call>
  void point(Call& call, const Arguments& arguments, void* maps) const;

  DLDevice device_;
  pybind11::object geometry_, backend_, owner_;
  const Calls* calls_ = nullptr;
  int64_t affine_size_, groups_;
  bool activates_, thresholded_, residual_;
  std::vector<int64_t> maps_shape_;
  // By whether the variance is among them; with the GIL.
  mutable std::array<pybind11::object, 2> maps_like_;
  mutable std::array<bool, 2> made_maps_{};
};

// Fills in the views of what Python gave, but for x; false where one of them is neither absent nor readable.
bool arguments_of(const Given& given, Arguments& arguments);

}  // namespace divnorm
