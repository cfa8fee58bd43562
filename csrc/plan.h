// A geometry on tensors of one dtype, memory format and device: from tensors to a backend's calls and back.
#pragma once

#include <array>
#include <vector>

#include "calls.h"
#include "torch_api.h"

namespace divnorm {

// The tensors of a call that were found fit for it, by their addresses.
struct Arguments {
  torch::View x;
  Parameter weight, bias, sigma;
  double sigma_value = 0;  // where sigma is a number
};

struct Results {
  pybind11::object y, maps, l1;  // l1 is None where it was not wanted
};

struct Upstream {
  PyObject *dy, *dl1;  // None: zero
};

using Needs = std::array<bool, 4>;                  // of the gradients of x, weight, bias and sigma
using Gradients = std::array<pybind11::object, 4>;  // None where not needed

class Plan {
 public:
  // backend: the module of Python's that it is of; calls: of the compiled module's, or None where the backend's own
  // functions do the work. `like` is an x of the plan.
  Plan(pybind11::object geometry, pybind11::object backend, pybind11::object calls, const pybind11::object& like);

  const pybind11::object& geometry() const { return geometry_; }
  const pybind11::object& backend() const { return backend_; }
  // Whether backward reads the values of the bias.
  bool reads_bias() const { return reads_bias_; }
  // Whether calls of it run in the compiled module from one end to the other.
  bool native() const { return calls_ != nullptr; }
  // Only of a native one.
  const Calls& calls() const { return *calls_; }
  int64_t affine_size() const { return affine_size_; }
  int64_t groups() const { return groups_; }
  const std::vector<int64_t>& maps_shape() const { return maps_shape_; }
  // The dtype of sums and maps.
  Dtype compute() const;

  // Whether these are arguments for the plan, x's view among them already. `shaped`: weight and bias may have any
  // number of dimensions; `of_layer`: a sigma of one number may have one.
  bool accepts(PyObject* weight, PyObject* bias, PyObject* sigma, bool shaped, bool of_layer,
               Arguments& arguments) const;

  // With `keep_maps` they are a tensor; None is returned in their place where nobody asks for them.
  Results forward(PyObject* x, PyObject* weight, PyObject* bias, PyObject* sigma, const Arguments& arguments,
                  bool with_l1, bool with_variance, bool keep_maps) const;

  // Whether gradients could be computed: not where a tensor is none for the plan. `bias` may be None where its
  // gradient is needed and its values are not: then it is of weight's shape and of `bias_dtype`.
  bool backward(Upstream upstream, PyObject* x, PyObject* maps, PyObject* weight, PyObject* bias, PyObject* bias_dtype,
                PyObject* sigma, Needs needs, Gradients& gradients) const;

 private:
  bool number(PyObject* tensor, const torch::View& x, const void*& address) const;
  pybind11::object make_maps(const torch::View& x, bool with_variance) const;

  DLDevice device_;
  pybind11::object geometry_, backend_, owner_;
  const Calls* calls_ = nullptr;
  int64_t affine_size_, groups_;
  bool reads_bias_;
  std::vector<int64_t> maps_shape_;
};

}  // namespace divnorm
