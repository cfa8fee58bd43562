#include "plan.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace divnorm {

namespace py = pybind11;
using torch::View;

namespace {

constexpr int64_t kWorthReleasing = 4096;  // numbers; below, letting other threads run takes longer than the kernel
constexpr int64_t kLoose = 1 << 16;        // bytes of maps that are not made a tensor

// Lets other threads of Python's run while a kernel does, where that takes time.
class Released {
 public:
  explicit Released(const View& x) {
    if (x.numel > kWorthReleasing || !x.on_cpu()) state_ = PyEval_SaveThread();
  }
  ~Released() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  PyThreadState* state_ = nullptr;
};

// The maps of the fields that are there, mean first, one after the other; last the variance, where it is asked for.
struct Maps {
  Maps(const Problem& problem, void* memory, bool with_variance = false) {
    char* address = static_cast<char*>(memory);
    const auto next = [&](bool present) -> void* {
      if (!present) return nullptr;
      char* here = address;
      address += problem.map_bytes();
      return here;
    };
    mean = next(problem.summation.present);
    rstd = next(problem.suppression.present);
    variance = next(with_variance);
  }
  void *mean, *rstd, *variance;
};

// Memory for maps that nobody keeps.
void* loose(int64_t bytes) {
  thread_local std::vector<double> memory;
  memory.resize(std::max<size_t>(memory.size(), (bytes + sizeof(double) - 1) / sizeof(double)));
  return memory.data();
}

bool lies_right(const Problem& problem, const View& x) {
  if (problem.channels_last && x.channels_last()) return true;
  return x.contiguous() && (!problem.channels_last || problem.positions() == 1);
}

Parameter room_for(const py::object& gradient, const Parameter& parameter) {
  return gradient.is_none() ? Parameter{} : Parameter{torch::data_of(gradient.ptr()), parameter.dtype, parameter.count};
}

// A parameter of a call on x, of whatever shape.
bool parameter_of(PyObject* tensor, const View& x, View& view, Parameter& parameter) {
  if (!torch::view_of(tensor, view) || !view.contiguous() || !view.beside(x)) return false;
  const bool half = x.dtype == Dtype::bfloat16 || x.dtype == Dtype::float16;
  if (view.dtype != x.dtype && !(half && view.dtype == Dtype::float32)) return false;
  parameter = {view.data(), view.dtype, view.numel};
  return true;
}

// Whether a parameter has the trailing shape of x.
bool trails(const View& parameter, const View& x) {
  const int before = x.raw.ndim - parameter.raw.ndim;
  return before >= 0 && std::equal(parameter.raw.shape, parameter.raw.shape + parameter.raw.ndim, x.raw.shape + before);
}

bool affine_of(PyObject* tensor, const View& x, int64_t count, bool shaped, View& view, Parameter& parameter) {
  return parameter_of(tensor, x, view, parameter) && view.numel == count &&
         (view.raw.ndim == 1 || (shaped && trails(view, x)));
}

bool sigma_of(PyObject* tensor, const View& x, int64_t groups, bool of_layer, Parameter& parameter) {
  View view;
  if (!parameter_of(tensor, x, view, parameter)) return false;
  if (view.raw.ndim == 0) return true;
  return view.raw.ndim == 1 && (view.numel == groups || (of_layer && view.numel == 1));
}

}  // namespace

Plan::Plan(py::object geometry, py::object backend, py::object calls, const py::object& like)
    : device_(torch::device_of(like.ptr())),
      geometry_(std::move(geometry)),
      backend_(std::move(backend)),
      owner_(std::move(calls)) {
  affine_size_ = geometry_.attr("affine_size").cast<int64_t>();
  groups_ = geometry_.attr("groups").cast<int64_t>();
  reads_bias_ = !geometry_.attr("norm").attr("activation").is_none();
  for (const py::handle extent : geometry_.attr("maps_shape")) maps_shape_.push_back(extent.cast<int64_t>());
  if (!owner_.is_none()) calls_ = py::capsule(owner_.attr("capsule")).get_pointer<const Calls>();
}

Dtype Plan::compute() const { return calls_->problem().dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

bool Plan::accepts(PyObject* weight, PyObject* bias, PyObject* sigma, bool shaped, bool of_layer,
                   Arguments& arguments) const {
  const View& x = arguments.x;
  if (x.raw.device.device_type != device_.device_type || x.raw.device.device_id != device_.device_id) return false;
  View of_weight, of_bias;
  if (weight != Py_None && !affine_of(weight, x, affine_size_, shaped, of_weight, arguments.weight)) return false;
  // the shape of bias's gradient is that of weight
  if (bias != Py_None && !(affine_of(bias, x, affine_size_, shaped, of_bias, arguments.bias) &&
                           (weight == Py_None ? of_bias.raw.ndim == 1 : of_bias.lies_as(of_weight))))
    return false;
  if (!PyFloat_CheckExact(sigma) && !PyLong_CheckExact(sigma))
    return sigma_of(sigma, x, groups_, of_layer, arguments.sigma);
  arguments.sigma_value = PyFloat_AsDouble(sigma);
  if (PyErr_Occurred()) {
    PyErr_Clear();  // an int that no float can hold
    return false;
  }
  return !std::isnan(arguments.sigma_value);
}

Results Plan::forward(PyObject* x, PyObject* weight, PyObject* bias, PyObject* sigma, const Arguments& arguments,
                      bool with_l1, bool with_variance, bool keep_maps) const {
  if (calls_ == nullptr) {
    const py::tuple found = backend_.attr("forward")(geometry_, py::handle(x), py::handle(weight), py::handle(bias),
                                                     py::handle(sigma), with_l1, with_variance);
    return {found[0], found[1], found[2]};
  }
  const Problem& problem = calls_->problem();
  const View& view = arguments.x;
  const bool in_passing = !keep_maps && view.on_cpu() && 3 * problem.map_bytes() <= kLoose;
  Results results{torch::empty_like(x), in_passing ? py::none() : make_maps(view, with_variance),
                  with_l1 ? torch::number_beside(x, compute()) : py::none()};
  ForwardCall call;
  call.tensors.x = view.data();
  call.tensors.weight = arguments.weight;
  call.tensors.bias = arguments.bias;
  call.tensors.sigma = arguments.sigma;
  call.sigma_value = arguments.sigma_value;
  call.tensors.y = torch::data_of(results.y.ptr());
  if (with_l1) call.l1 = torch::data_of(results.l1.ptr());
  const torch::Scratch scratch(view, calls_->scratch_bytes(Direction::forward));
  call.place = {view.raw.device.device_id, torch::current_stream(view), view.on_cpu() ? torch::threads() : 1,
                scratch.data()};
  // last: what runs in between, as an object goes, may make a call that needs more of it
  const Maps maps(problem, in_passing ? loose(3 * problem.map_bytes()) : torch::data_of(results.maps.ptr()),
                  with_variance);
  call.tensors.mean = maps.mean;
  call.tensors.rstd = maps.rstd;
  call.tensors.variance = maps.variance;
  const Released released(view);
  calls_->forward(call);
  return results;
}

py::object Plan::make_maps(const View& x, bool with_variance) const {
  std::vector<int64_t> shape = maps_shape_;
  shape[0] += with_variance;
  return torch::empty(x, compute(), shape);
}

bool Plan::number(PyObject* tensor, const View& x, const void*& address) const {
  View view;
  if (!torch::view_of(tensor, view) || view.numel != 1 || view.dtype != compute() || !view.beside(x)) return false;
  address = view.data();
  return true;
}

bool Plan::backward(Upstream upstream, PyObject* x, PyObject* maps, PyObject* weight, PyObject* bias,
                    PyObject* bias_dtype, PyObject* sigma, Needs needs, Gradients& gradients) const {
  if (calls_ == nullptr) return false;
  const Problem& problem = calls_->problem();
  Arguments arguments;
  View kept, dy;
  if (!torch::view_of(x, arguments.x) || arguments.x.dtype != problem.dtype || arguments.x.numel != problem.numel() ||
      !lies_right(problem, arguments.x))
    return false;
  if (!accepts(weight, bias, sigma, true, true, arguments)) return false;
  if (!torch::view_of(maps, kept) || kept.dtype != compute() || !kept.contiguous() || !kept.beside(arguments.x) ||
      kept.numel * (compute() == Dtype::float64 ? 8 : 4) <
          (problem.summation.present + problem.suppression.present) * problem.map_bytes())
    return false;
  BackwardCall call;
  py::object turned;
  if (upstream.dy == Py_None) {
    turned = torch::zeros_like(x);
    call.tensors.dy = torch::data_of(turned.ptr());
  } else {
    if (!torch::view_of(upstream.dy, dy) || dy.dtype != problem.dtype || !dy.beside(arguments.x)) return false;
    if (!dy.lies_as(arguments.x)) return false;
    call.tensors.dy = dy.data();
  }
  if (upstream.dl1 != Py_None && !number(upstream.dl1, arguments.x, call.dl1)) return false;
  Parameter bias_like = arguments.bias;
  PyObject* bias_room = bias;
  if (needs[2] && bias == Py_None) {
    if (weight == Py_None) return false;
    if (torch::dtype_of(weight).ptr() != bias_dtype) return false;
    bias_room = weight;
    bias_like = arguments.weight;
  }
  const auto room = [](bool needed, PyObject* like) { return needed ? torch::empty_like(like) : py::none(); };
  const py::object dx = torch::empty_like(x);
  gradients = {needs[0] ? dx : py::none(), room(needs[1], weight), room(needs[2], bias_room), room(needs[3], sigma)};
  const Maps both(problem, kept.data());
  call.tensors.x = arguments.x.data();
  call.tensors.mean = both.mean;
  call.tensors.rstd = both.rstd;
  call.tensors.weight = arguments.weight;
  call.tensors.bias = arguments.bias;
  call.tensors.sigma = arguments.sigma;
  call.sigma_value = arguments.sigma_value;
  call.tensors.dx = torch::data_of(dx.ptr());
  call.tensors.dweight = room_for(gradients[1], arguments.weight);
  call.tensors.dbias = room_for(gradients[2], bias_like);
  call.tensors.dsigma = room_for(gradients[3], arguments.sigma);
  if (needs[3] && !problem.suppression.present) torch::zero(gradients[3].ptr());  // sigma is not used
  const torch::Scratch scratch(arguments.x, calls_->scratch_bytes(Direction::backward));
  call.place = {arguments.x.raw.device.device_id, torch::current_stream(arguments.x),
                arguments.x.on_cpu() ? torch::threads() : 1, scratch.data()};
  const Released released(arguments.x);
  calls_->backward(call);
  return true;
}

}  // namespace divnorm
