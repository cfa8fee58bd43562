#include "plan.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

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

Parameter parameter(const View& view) {
  return view.given ? Parameter{view.data(), view.dtype, view.numel} : Parameter{};
}

// Whether a parameter may stand beside x, whatever its shape.
bool suits(const View& parameter, const View& x) {
  const bool half = x.dtype == Dtype::bfloat16 || x.dtype == Dtype::float16;
  return parameter.contiguous() && parameter.beside(x) &&
         (parameter.dtype == x.dtype || (half && parameter.dtype == Dtype::float32));
}

// Whether a parameter has the trailing shape of x.
bool trails(const View& parameter, const View& x) {
  const int before = x.raw.ndim - parameter.raw.ndim;
  return before >= 0 && std::equal(parameter.raw.shape, parameter.raw.shape + parameter.raw.ndim, x.raw.shape + before);
}

bool fits_affine(const View& parameter, const View& x, int64_t count, bool any_rank) {
  return suits(parameter, x) && parameter.numel == count &&
         (parameter.raw.ndim == 1 || (any_rank && trails(parameter, x)));
}

bool fits_sigma(const View& sigma, const View& x, int64_t groups, bool one_in_a_row) {
  if (!suits(sigma, x)) return false;
  return sigma.raw.ndim == 0 || (sigma.raw.ndim == 1 && (sigma.numel == groups || (one_in_a_row && sigma.numel == 1)));
}

// Whether a tensor like x in every way may stand beside it.
bool accompanies(const View& other, const View& x) {
  return other.dtype == x.dtype && other.beside(x) && other.lies_as(x);
}

int64_t kept_bytes(const Problem& problem) {
  return (problem.summation.present + problem.suppression.present) * problem.map_bytes();
}

Place place_of(const View& x, const torch::Scratch& scratch) {
  return {x.raw.device.device_id, torch::current_stream(x), x.on_cpu() ? torch::threads() : 1, scratch.data()};
}

bool view_of_optional(PyObject* given, View& view) { return given == Py_None || torch::view_of(given, view); }

}  // namespace

PlanKey::PlanKey(const View& x, bool residual)
    : shape_{},
      ndim_(x.raw.ndim),
      dtype_(x.dtype),
      device_type_(x.raw.device.device_type),
      device_(x.raw.device.device_id),
      contiguous_(x.contiguous()),
      residual_(residual) {
  std::copy(x.raw.shape, x.raw.shape + ndim_, shape_.begin());
}

bool PlanKey::operator==(const PlanKey& other) const {
  return shape_ == other.shape_ && ndim_ == other.ndim_ && dtype_ == other.dtype_ &&
         device_type_ == other.device_type_ && device_ == other.device_ && contiguous_ == other.contiguous_ &&
         residual_ == other.residual_;
}

size_t PlanKey::hash() const {
  size_t hash = static_cast<size_t>(dtype_) << 8 | static_cast<size_t>(ndim_) << 2 |
                static_cast<size_t>(contiguous_) << 1 | static_cast<size_t>(residual_);
  const auto mix = [&](int64_t value) { hash = (hash ^ static_cast<size_t>(value)) * 0x9E3779B97F4A7C15u; };
  for (int d = 0; d < ndim_; ++d) mix(shape_[d]);
  mix(device_type_);
  mix(device_);
  return hash;
}

bool arguments_of(const Given& given, Arguments& arguments) {
  if (!view_of_optional(given.weight, arguments.weight) || !view_of_optional(given.bias, arguments.bias) ||
      !view_of_optional(given.residual, arguments.residual) || !view_of_optional(given.threshold, arguments.threshold))
    return false;
  if (!PyFloat_CheckExact(given.sigma) && !PyLong_CheckExact(given.sigma))
    return torch::view_of(given.sigma, arguments.sigma);
  arguments.sigma_value = PyFloat_AsDouble(given.sigma);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();  // an int that no float can hold
  return false;
}

Plan::Plan(py::object geometry, py::object backend, py::object calls, const py::object& like, bool residual)
    : device_(torch::device_of(like.ptr())),
      geometry_(std::move(geometry)),
      backend_(std::move(backend)),
      owner_(std::move(calls)),
      residual_(residual) {
  affine_size_ = geometry_.attr("affine_size").cast<int64_t>();
  groups_ = geometry_.attr("groups").cast<int64_t>();
  const py::object activation = geometry_.attr("norm").attr("activation");
  activates_ = !activation.is_none();
  thresholded_ = activates_ && activation.cast<std::string>() == "tlu";
  for (const py::handle extent : geometry_.attr("maps_shape")) maps_shape_.push_back(extent.cast<int64_t>());
  if (!owner_.is_none()) calls_ = py::capsule(owner_.attr("capsule")).get_pointer<const Calls>();
}

std::vector<int64_t> Plan::maps_shape(bool with_variance) const {
  std::vector<int64_t> shape = maps_shape_;
  shape[0] += with_variance;
  return shape;
}

// By empty_like, the cheapest of torch's ways; its model costs more than one call gains, so it is there from the second
// call on.
py::object Plan::make_maps(PyObject* x, const View& view, bool with_variance) const {
  py::object& like = maps_like_[with_variance];
  if (!like && made_maps_[with_variance]) like = torch::shaped_like(x, compute(), maps_shape(with_variance));
  made_maps_[with_variance] = true;
  return like ? torch::empty_like(like.ptr()) : torch::empty(view, compute(), maps_shape(with_variance));
}

bool Plan::fits(const Arguments& arguments, Leeway leeway) const {
  const View &x = arguments.x, &residual = arguments.residual;
  if (residual.given != residual_) return false;
  if (residual_ && !accompanies(residual, x)) return false;
  return fits_parameters(arguments, leeway);
}

bool Plan::fits_parameters(const Arguments& arguments, Leeway leeway) const {
  const View &x = arguments.x, &weight = arguments.weight, &bias = arguments.bias, &threshold = arguments.threshold;
  if (x.raw.device.device_type != device_.device_type || x.raw.device.device_id != device_.device_id) return false;
  if (weight.given && !fits_affine(weight, x, affine_size_, leeway.any_rank)) return false;
  // the shape of bias's gradient is that of weight
  if (bias.given && !(fits_affine(bias, x, affine_size_, leeway.any_rank) &&
                      (weight.given ? bias.lies_as(weight) : bias.raw.ndim == 1)))
    return false;
  if (threshold.given != thresholded_) return false;
  if (thresholded_ && !fits_affine(threshold, x, affine_size_, leeway.any_rank)) return false;
  if (arguments.sigma.given) return fits_sigma(arguments.sigma, x, groups_, leeway.one_in_a_row);
  return !std::isnan(arguments.sigma_value);
}

bool Plan::fits(const Arguments& arguments, const Upstream& upstream, Leeway leeway) const {
  const Problem& problem = calls_->problem();
  const View &x = arguments.x, &dy = upstream.dy, &dl1 = upstream.dl1, &maps = upstream.maps;
  const View& residual = arguments.residual;
  if (x.dtype != problem.dtype || x.numel != problem.numel() || !lies_right(problem, x)) return false;
  if (residual.given != (residual_ && activates_)) return false;
  if (residual.given && !accompanies(residual, x)) return false;
  if (!fits_parameters(arguments, leeway)) return false;
  if (!accompanies(dy, x)) return false;
  if (dl1.given && (dl1.numel != 1 || dl1.dtype != compute() || !dl1.beside(x))) return false;
  return maps.dtype == compute() && maps.contiguous() && maps.beside(x) &&
         maps.numel * bytes_of(maps.dtype) >= kept_bytes(problem);
}

// What calls of both directions have; the maps of the fields that are there lie one after the other, mean first.
template <class Call>
void Plan::point(Call& call, const Arguments& arguments, void* maps) const {
  const Problem& problem = calls_->problem();
  auto* address = static_cast<char*>(maps);
  call.tensors.x = arguments.x.data();
  if (arguments.residual.given) call.tensors.residual = arguments.residual.data();
  call.tensors.weight = parameter(arguments.weight);
  call.tensors.bias = parameter(arguments.bias);
  call.tensors.sigma = parameter(arguments.sigma);
  call.tensors.threshold = parameter(arguments.threshold);
  call.sigma_value = arguments.sigma_value;
  if (problem.summation.present) call.tensors.mean = address;
  if (problem.suppression.present) call.tensors.rstd = address + problem.summation.present * problem.map_bytes();
}

ForwardCall Plan::forward_call(const Arguments& arguments, void* y, void* maps, bool with_variance, void* l1) const {
  ForwardCall call;
  point(call, arguments, maps);
  call.tensors.y = y;
  if (with_variance) call.tensors.variance = static_cast<char*>(maps) + kept_bytes(calls_->problem());
  call.l1 = l1;
  return call;
}

BackwardCall Plan::backward_call(const Arguments& arguments, const Upstream& upstream) const {
  BackwardCall call;
  point(call, arguments, upstream.maps.data());
  call.tensors.dy = upstream.dy.data();
  if (upstream.dl1.given) call.dl1 = upstream.dl1.data();
  return call;
}

Results Plan::forward(const Given& given, const Arguments& arguments, bool with_l1, bool with_variance,
                      bool keep_maps) const {
  PyObject* x = given.x;
  if (!native()) {
    const py::tuple found = backend_.attr("forward")(
        geometry_, py::handle(x), py::handle(given.weight), py::handle(given.bias), py::handle(given.sigma), with_l1,
        with_variance, py::handle(given.residual), py::handle(given.threshold));
    return {found[0], found[1], found[2]};
  }
  const View& view = arguments.x;
  const int64_t most_bytes = 3 * calls_->problem().map_bytes();
  const bool in_passing = !keep_maps && view.on_cpu() && most_bytes <= kLoose;
  Results results{torch::empty_like(x), in_passing ? py::none() : make_maps(x, view, with_variance),
                  with_l1 ? torch::number_beside(x, compute()) : py::none()};
  void* l1 = with_l1 ? torch::data_of(results.l1.ptr()) : nullptr;
  const torch::Scratch scratch(view, calls_->scratch_bytes(Direction::forward));
  const Place place = place_of(view, scratch);
  // last: what runs in between, as an object goes, may make a call that needs more of it
  void* maps = in_passing ? loose(most_bytes) : torch::data_of(results.maps.ptr());
  ForwardCall call = forward_call(arguments, torch::data_of(results.y.ptr()), maps, with_variance, l1);
  call.place = place;
  const Released released(view);
  calls_->forward(call);
  return results;
}

bool Plan::backward(PyObject* dy, PyObject* dl1, const Saved& saved, PyObject* bias_dtype, Needs needs,
                    Gradients& gradients) const {
  if (!native()) return false;
  const Given& given = saved.given;
  if (needs == Needs{false, false, false, false, true, false} && !activates_) {
    gradients.fill(py::none());
    gradients[4] = py::reinterpret_borrow<py::object>(dy);
    return true;
  }
  Arguments arguments;
  Upstream upstream;
  py::object zero;
  if (dy == Py_None) {
    zero = torch::zeros_like(given.x);
    dy = zero.ptr();
  }
  if (!torch::view_of(given.x, arguments.x) || !arguments_of(given, arguments) || !torch::view_of(dy, upstream.dy) ||
      !view_of_optional(dl1, upstream.dl1) || !torch::view_of(saved.maps, upstream.maps) ||
      !fits(arguments, upstream, {true, true}))
    return false;
  View bias = arguments.bias;
  PyObject* like_bias = given.bias;
  if (needs[2] && !bias.given) {
    if (given.weight == Py_None || torch::dtype_of(given.weight).ptr() != bias_dtype) return false;
    bias = arguments.weight;
    like_bias = given.weight;
  }
  const auto made = [](bool needed, PyObject* like) { return needed ? torch::empty_like(like) : py::none(); };
  const auto room = [](const py::object& gradient, const View& like) {
    return gradient.is_none() ? Parameter{} : Parameter{torch::data_of(gradient.ptr()), like.dtype, like.numel};
  };
  const py::object dx = torch::empty_like(given.x);
  gradients = {needs[0] ? dx : py::none(),
               made(needs[1], given.weight),
               made(needs[2], like_bias),
               made(needs[3], given.sigma),
               made(needs[4] && activates_, given.residual),
               made(needs[5], given.threshold)};
  if (needs[3] && !calls_->problem().suppression.present) torch::zero(gradients[3].ptr());  // sigma is not used
  const torch::Scratch scratch(arguments.x, calls_->scratch_bytes(Direction::backward));
  BackwardCall call = backward_call(arguments, upstream);
  call.tensors.dx = torch::data_of(dx.ptr());
  call.tensors.dweight = room(gradients[1], arguments.weight);
  call.tensors.dbias = room(gradients[2], bias);
  call.tensors.dsigma = room(gradients[3], arguments.sigma);
  call.tensors.dthreshold = room(gradients[5], arguments.threshold);
  if (!gradients[4].is_none()) call.tensors.dresidual = torch::data_of(gradients[4].ptr());
  if (needs[4] && !activates_) gradients[4] = py::reinterpret_borrow<py::object>(dy);
  call.place = place_of(arguments.x, scratch);
  const Released released(arguments.x);
  calls_->backward(call);
  return true;
}

}  // namespace divnorm
