// What is asked of torch, by DLPack's exchange API and a few of its Python functions. No header of torch's is used: one
// binary serves all of its versions from 2.11 on. The GIL is held in all of this.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include DIVNORM_DLPACK

#include "problem.h"

namespace divnorm::torch {

namespace py = pybind11;

// Looks torch up. Throws where it offers no exchange API of a version known here; nothing below may be called then.
void connect();

constexpr int kMostDims = 8;  // of a view

// A tensor in memory as its sizes and strides say, where `view_of` has filled it in; until then an absent one.
struct View {
  DLTensor raw{};
  Dtype dtype{};
  int64_t numel = 0;
  bool given = false;

  void* data() const { return static_cast<char*>(raw.data) + raw.byte_offset; }
  bool on_cpu() const { return raw.device.device_type == kDLCPU; }
  bool beside(const View& other) const {
    return raw.device.device_type == other.raw.device.device_type && raw.device.device_id == other.raw.device.device_id;
  }
  bool contiguous() const;
  bool channels_last() const;
  bool lies_as(const View& other) const;
};

// Fills in the view where the numbers of a tensor are all there to be read: with a storage that reaches to the last
// one, not negated, of a dtype of this package, without gaps. Where not, there is no error either.
bool view_of(PyObject* tensor, View& view);

// Whether it is a torch.Tensor or Parameter, and of no type that wants to be asked first.
bool plain(PyObject* tensor);

// Whether calls run at once: no mode, transformation or recorder of torch's wants to see them.
bool eager();
bool gradients_enabled();
bool requires_grad(PyObject* tensor);
py::object attribute(PyObject* owner, PyObject* name);
py::object dtype_of(PyObject* tensor);
int threads();
// Those of a GPU; 0 elsewhere.
uintptr_t current_stream(const View& view);

py::object empty_like(PyObject* tensor);
py::object zeros_like(PyObject* tensor);
// A tensor on the device of `like` that no user sees: its memory is torch's, but what torch.Tensor.resize_ and the like
// would change is not.
py::object empty(const View& like, Dtype dtype, const std::vector<int64_t>& shape);
// A tensor of this shape on the device of `tensor`, of one number in memory: what `empty_like` of it gives is dense.
py::object shaped_like(PyObject* tensor, Dtype dtype, const std::vector<int64_t>& shape);
// A number on the device of `tensor`, float64 or float32.
py::object number_beside(PyObject* tensor, Dtype dtype);
void* data_of(PyObject* tensor);
DLDevice device_of(PyObject* tensor);
void zero(PyObject* tensor);

// Memory on the device of `like`, for as long as this lives; none for no bytes.
class Scratch {
 public:
  Scratch(const View& like, int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return memory_ == nullptr ? nullptr : memory_->dl_tensor.data; }

 private:
  DLManagedTensorVersioned* memory_ = nullptr;
};

}  // namespace divnorm::torch
