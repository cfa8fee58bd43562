#include "torch_api.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

namespace divnorm::torch {
namespace {

// Looked up once and never let go: the interpreter may be gone before this module is.
struct Torch {
  const DLPackExchangeAPI* api = nullptr;
  PyObject *tensor, *parameter;
  PyObject *is_neg, *storage_of, *storage_bytes, *storage_offset, *requires_grad, *zero;
  PyObject *empty_like, *zeros_like, *grad_enabled, *num_threads;
  PyObject *dispatch_modes, *function_modes, *transforms, *tracer;
  PyObject *new_empty, *nothing, *dtype, *dtype_keyword, *float32, *float64;
  PyObject* out_of_memory;
  PyObject *compiler, *compiling, *forward_ad, *level;
};
Torch known;

PyObject* kept(const py::object& object) { return py::object(object).release().ptr(); }

py::object called(PyObject* function, PyObject* argument) {
  PyObject* arguments[] = {argument};
  PyObject* result = PyObject_Vectorcall(function, arguments, 1, nullptr);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object called(PyObject* function) {
  PyObject* result = PyObject_CallNoArgs(function);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

int64_t number(const py::object& object) {
  const int64_t value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool known_dtype(const DLDataType& type, Dtype& dtype) {
  if (type.lanes != 1) return false;
  if (type.code == kDLFloat && type.bits == 64)
    dtype = Dtype::float64;
  else if (type.code == kDLFloat && type.bits == 32)
    dtype = Dtype::float32;
  else if (type.code == kDLBfloat && type.bits == 16)
    dtype = Dtype::bfloat16;
  else if (type.code == kDLFloat && type.bits == 16)
    dtype = Dtype::float16;
  else
    return false;
  return true;
}

// Dimensions from the one that lies last to the one that lies first: `next` gives the one after a dimension.
template <class Next>
bool without_gaps(const DLTensor& t, int last, Next next) {
  int64_t stride = 1;
  for (int done = 0, d = last; done < t.ndim; ++done, d = next(d)) {
    if (t.shape[d] != 1 && t.strides[d] != stride) return false;
    stride *= t.shape[d];
  }
  return true;
}

// As torch's own would be: code catches it by its type.
void raise_allocation(void*, const char* kind, const char* message) {
  const bool memory = std::string(message).find("out of memory") != std::string::npos;
  PyErr_SetString(memory ? known.out_of_memory : PyExc_RuntimeError, (std::string(kind) + ": " + message).c_str());
}

DLManagedTensorVersioned* allocated(const View& like, DLDataType dtype, const int64_t* shape, int ndim) {
  DLTensor wanted{};
  wanted.device = like.raw.device;
  wanted.dtype = dtype;
  wanted.ndim = ndim;
  wanted.shape = const_cast<int64_t*>(shape);
  DLManagedTensorVersioned* memory = nullptr;
  if (known.api->managed_tensor_allocator(&wanted, &memory, nullptr, raise_allocation) != 0)
    throw py::error_already_set();
  return memory;
}

}  // namespace

py::object attribute(PyObject* owner, PyObject* name) {
  PyObject* value = PyObject_GetAttr(owner, name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

void connect() {
  const py::object torch = py::module_::import("torch"), c = torch.attr("_C"), tensor = torch.attr("Tensor");
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->header.version.major != DLPACK_MAJOR_VERSION)
    throw std::runtime_error("torch's exchange API has version " + std::to_string(api->header.version.major) +
                             ", expected " + std::to_string(DLPACK_MAJOR_VERSION));
  const py::object base = c.attr("TensorBase");
  known.tensor = kept(tensor);
  known.parameter = kept(torch.attr("nn").attr("Parameter"));
  known.is_neg = kept(base.attr("is_neg"));
  known.storage_of = kept(tensor.attr("untyped_storage"));
  known.storage_bytes = kept(torch.attr("UntypedStorage").attr("nbytes"));
  known.storage_offset = kept(base.attr("storage_offset"));
  known.zero = kept(base.attr("zero_"));
  known.requires_grad = kept(py::str("requires_grad"));
  known.empty_like = kept(torch.attr("empty_like"));
  known.zeros_like = kept(torch.attr("zeros_like"));
  known.grad_enabled = kept(torch.attr("is_grad_enabled"));
  known.num_threads = kept(torch.attr("get_num_threads"));
  known.dispatch_modes = kept(c.attr("_len_torch_dispatch_stack"));
  known.function_modes = kept(c.attr("_len_torch_function_stack"));
  known.transforms = kept(c.attr("_are_functorch_transforms_active"));
  known.tracer = kept(c.attr("_get_tracing_state"));
  known.new_empty = kept(base.attr("new_empty"));
  known.nothing = kept(py::tuple());
  known.dtype = kept(py::str("dtype"));
  known.dtype_keyword = kept(py::make_tuple("dtype"));
  known.float32 = kept(torch.attr("float32"));
  known.float64 = kept(torch.attr("float64"));
  known.out_of_memory = kept(torch.attr("OutOfMemoryError"));
  known.compiler = kept(torch.attr("compiler"));
  known.compiling = kept(py::str("_is_compiling_flag"));
  known.forward_ad = kept(py::module_::import("torch.autograd.forward_ad"));
  known.level = kept(py::str("_current_level"));
  known.api = api;
}

bool View::contiguous() const {
  return numel == 0 || without_gaps(raw, raw.ndim - 1, [](int d) { return d - 1; });
}

bool View::channels_last() const {
  // the second dimension lies last, then come the others from the last to the third, then the first
  return raw.ndim > 2 && without_gaps(raw, 1, [&](int d) { return d == 1 ? raw.ndim - 1 : d == 2 ? 0 : d - 1; });
}

bool View::lies_as(const View& other) const {
  if (raw.ndim != other.raw.ndim) return false;
  for (int d = 0; d < raw.ndim; ++d) {
    if (raw.shape[d] != other.raw.shape[d]) return false;
    if (raw.shape[d] != 1 && raw.strides[d] != other.raw.strides[d]) return false;
  }
  return true;
}

DLDevice device_of(PyObject* tensor) {
  DLTensor raw;
  if (known.api->dltensor_from_py_object_no_sync(tensor, &raw) != 0) throw py::error_already_set();
  return raw.device;
}

bool view_of(PyObject* tensor, View& view) {
  if (!PyType_IsSubtype(Py_TYPE(tensor), reinterpret_cast<PyTypeObject*>(known.tensor))) return false;
  if (known.api->dltensor_from_py_object_no_sync(tensor, &view.raw) != 0) {
    PyErr_Clear();  // sparse, nested, meta and the like
    return false;
  }
  if (view.raw.ndim > kMostDims || !known_dtype(view.raw.dtype, view.dtype)) return false;
  view.numel = 1;
  for (int d = 0; d < view.raw.ndim; ++d) view.numel *= view.raw.shape[d];
  if (view.numel > 0 && view.raw.data == nullptr) return false;
  if (called(known.is_neg, tensor).ptr() != Py_False) return false;
  // where nothing lies between the numbers, the last of them is the numel-th
  if (!view.contiguous() && !view.channels_last()) return false;
  const int64_t held = number(called(known.storage_bytes, called(known.storage_of, tensor).ptr()));
  view.given = (number(called(known.storage_offset, tensor)) + view.numel) * bytes_of(view.dtype) <= held;
  return view.given;
}

bool plain(PyObject* tensor) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type == known.tensor || type == known.parameter;
}

bool eager() {
  return number(called(known.dispatch_modes)) == 0 && number(called(known.function_modes)) == 0 &&
         called(known.transforms).ptr() == Py_False && number(attribute(known.forward_ad, known.level)) < 0 &&
         called(known.tracer).is_none() && attribute(known.compiler, known.compiling).ptr() == Py_False;
}

bool gradients_enabled() { return called(known.grad_enabled).ptr() == Py_True; }

bool requires_grad(PyObject* tensor) { return attribute(tensor, known.requires_grad).ptr() == Py_True; }

py::object dtype_of(PyObject* tensor) { return attribute(tensor, known.dtype); }

int threads() { return static_cast<int>(number(called(known.num_threads))); }

uintptr_t current_stream(const View& view) {
  if (view.on_cpu()) return 0;
  void* stream = nullptr;
  if (known.api->current_work_stream(view.raw.device.device_type, view.raw.device.device_id, &stream) != 0)
    throw py::error_already_set();
  return reinterpret_cast<uintptr_t>(stream);
}

py::object empty_like(PyObject* tensor) { return called(known.empty_like, tensor); }

py::object zeros_like(PyObject* tensor) { return called(known.zeros_like, tensor); }

py::object empty(const View& like, Dtype dtype, const std::vector<int64_t>& shape) {
  DLManagedTensorVersioned* memory =
      allocated(like, dtype == Dtype::float64 ? DLDataType{kDLFloat, 64, 1} : DLDataType{kDLFloat, 32, 1}, shape.data(),
                static_cast<int>(shape.size()));
  void* tensor = nullptr;
  if (known.api->managed_tensor_to_py_object_no_sync(memory, &tensor) != 0) {
    memory->deleter(memory);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
}

py::object shaped_like(PyObject* tensor, Dtype dtype, const std::vector<int64_t>& shape) {
  return number_beside(tensor, dtype).attr("expand")(py::cast(shape));
}

py::object number_beside(PyObject* tensor, Dtype dtype) {
  PyObject* arguments[] = {tensor, known.nothing, dtype == Dtype::float64 ? known.float64 : known.float32};
  PyObject* result = PyObject_Vectorcall(known.new_empty, arguments, 2, known.dtype_keyword);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

void* data_of(PyObject* tensor) {
  DLTensor raw;
  if (known.api->dltensor_from_py_object_no_sync(tensor, &raw) != 0) throw py::error_already_set();
  return static_cast<char*>(raw.data) + raw.byte_offset;
}

void zero(PyObject* tensor) { called(known.zero, tensor); }

Scratch::Scratch(const View& like, int64_t bytes) {
  if (bytes == 0) return;
  memory_ = allocated(like, {kDLUInt, 8, 1}, &bytes, 1);
}

Scratch::~Scratch() {
  if (memory_ != nullptr) memory_->deleter(memory_);
}

}  // namespace divnorm::torch
