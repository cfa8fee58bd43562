// divnorm_kernels::forward and ::backward on the CPU, as kernels of torch's dispatcher: what compiled graphs call.
//
// They only ever say yes. Whatever is unusual about a call, and the first one of a kind, goes on to the operator's
// namesake in Python (divnorm_kernels/ops.py), which knows everything, says what is wrong, and tells the plan that the
// next call of this kind is served by. The schemas stand there.
#include "operators.h"

#include <pybind11/stl.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "known_plans.h"
#include "shims.h"

namespace divnorm {

namespace py = pybind11;
using shims::Kind;
using shims::Slot;
using shims::Tensor;
using shims::Value;
using torch::View;

namespace {

// Never destroyed: the interpreter, which plans need, may be gone before this module is.
KnownPlans& known = *new KnownPlans;

std::atomic<int64_t> forward_calls{0}, backward_calls{0};  // served here

bool view_of(Value given, View& view) { return shims::view_of(shims::handle(given), view); }

// Of an optional tensor, which may be absent.
bool view_of_optional(Value given, View& view) { return given == 0 || view_of(shims::held(given), view); }

struct Places {
  int x, weight, bias, sigma, sigma_value, norm, backend, residual, threshold;
};

// The plan for a call, or null where there is none yet or a tensor is unusual.
std::shared_ptr<const Plan> plan_for(const Value* given, const Places& at, Arguments& arguments) {
  if (!view_of(given[at.x], arguments.x) || arguments.x.numel == 0) return nullptr;
  if (!view_of_optional(given[at.weight], arguments.weight) || !view_of_optional(given[at.bias], arguments.bias) ||
      !view_of_optional(given[at.sigma], arguments.sigma) ||
      !view_of_optional(given[at.residual], arguments.residual) ||
      !view_of_optional(given[at.threshold], arguments.threshold))
    return nullptr;
  arguments.sigma_value = shims::real(given[at.sigma_value]);
  const Value backend = given[at.backend];
  return known.find({shims::text(given[at.norm]), backend == 0 ? "" : shims::text(shims::held(backend)), arguments.x,
                     arguments.residual.given});
}

struct Forward {
  static constexpr Slot kSlots[] = {{Kind::tensor},       {Kind::tensor, true}, {Kind::tensor, true},
                                    {Kind::tensor, true}, {Kind::number},       {Kind::text},
                                    {Kind::number},       {Kind::number},       {Kind::text, true},
                                    {Kind::tensor, true}, {Kind::tensor, true}};
  static constexpr const char* kInPython = "divnorm_kernels::forward_in_python";
  using Results = std::array<Tensor, 3>;  // y, maps, l1

  static bool serve(const Value* given, Results& results) {
    Arguments arguments;
    const std::shared_ptr<const Plan> plan = plan_for(given, {0, 1, 2, 3, 4, 5, 8, 9, 10}, arguments);
    if (plan == nullptr || !plan->fits(arguments, {})) return false;
    const bool with_l1 = given[6] & 1, with_variance = given[7] & 1;
    const Problem& problem = plan->calls().problem();
    if (with_variance && !(problem.whole && problem.suppression.present)) return false;
    Tensor y(arguments.x), maps(plan->maps_shape(with_variance), plan->compute());
    Tensor l1(with_l1 ? std::vector<int64_t>{} : std::vector<int64_t>{0}, plan->compute());
    ForwardCall call =
        plan->forward_call(arguments, y.data(), maps.data(), with_variance, with_l1 ? l1.data() : nullptr);
    call.place.threads = shims::threads();
    plan->calls().forward(call);
    results = {std::move(y), std::move(maps), std::move(l1)};
    ++forward_calls;
    return true;
  }
};

struct Backward {
  static constexpr Slot kSlots[] = {
      {Kind::tensor, true}, {Kind::tensor, true}, {Kind::tensor},       {Kind::tensor},      {Kind::tensor, true},
      {Kind::tensor, true}, {Kind::number, true}, {Kind::tensor, true}, {Kind::number},      {Kind::text},
      {Kind::list},         {Kind::text, true},   {Kind::tensor, true}, {Kind::tensor, true}};
  static constexpr const char* kInPython = "divnorm_kernels::backward_in_python";
  using Results = std::array<Tensor, 6>;  // dx, dweight, dbias, dsigma, dresidual, dthreshold

  static bool serve(const Value* given, Results& results) {
    Arguments arguments;
    Upstream upstream;
    const std::shared_ptr<const Plan> plan = plan_for(given, {2, 4, 5, 7, 8, 9, 11, 12, 13}, arguments);
    if (plan == nullptr || given[0] == 0 || !view_of_optional(given[0], upstream.dy) ||
        !view_of_optional(given[1], upstream.dl1) || !view_of(given[3], upstream.maps) ||
        !plan->fits(arguments, upstream, {}))
      return false;
    const std::vector<Value> needed = shims::list(given[10]);
    if (needed.size() != std::tuple_size_v<Results>) return false;
    const auto needs = [&](int i) { return (needed[i] & 1) != 0; };
    if ((needs(1) && !arguments.weight.given) || (needs(3) && !arguments.sigma.given) ||
        (needs(4) && !arguments.residual.given) || (needs(5) && !arguments.threshold.given))
      return false;
    // the gradient of a bias whose values nothing reads is as weight's
    const bool unread = needs(2) && !arguments.bias.given;
    if (unread && (!arguments.weight.given || given[6] == 0 ||
                   static_cast<int32_t>(shims::held(given[6])) != shims::code_of(arguments.weight.dtype)))
      return false;

    const Dtype dtype = arguments.x.dtype;
    BackwardCall call = plan->backward_call(arguments, upstream);
    BackwardTensors& tensors = call.tensors;
    Tensor dx(arguments.x);
    tensors.dx = dx.data();
    const auto made = [&](int i, const View& like, Parameter& gradient) {
      if (!needs(i)) return Tensor({0}, dtype);
      Tensor tensor(like);
      gradient = {tensor.data(), like.dtype, like.numel};
      return tensor;
    };
    Parameter dresidual;
    Tensor dweight = made(1, arguments.weight, tensors.dweight),
           dbias = made(2, unread ? arguments.weight : arguments.bias, tensors.dbias),
           dsigma = made(3, arguments.sigma, tensors.dsigma), added = made(4, arguments.residual, dresidual),
           dthreshold = made(5, arguments.threshold, tensors.dthreshold);
    tensors.dresidual = dresidual.data;
    if (needs(3) && !plan->calls().problem().suppression.present)  // sigma is not used
      std::memset(tensors.dsigma.data, 0, tensors.dsigma.count * bytes_of(tensors.dsigma.dtype));
    call.place.threads = shims::threads();
    plan->calls().backward(call);
    results = {needs(0) ? std::move(dx) : Tensor({0}, dtype),
               std::move(dweight),
               std::move(dbias),
               std::move(dsigma),
               std::move(added),
               std::move(dthreshold)};
    ++backward_calls;
    return true;
  }
};

// A call that Python serves. Its texts, norm and backend, do not go by torch's stack: torch's own conversion of a
// string (ToImpl<std::string>, 2.11 to 2.14) forgets a copy of each.
struct HandedOver {
  HandedOver() : outer(std::exchange(latest, this)) {}
  ~HandedOver() { latest = outer; }

  std::array<std::optional<std::string>, 2> texts;
  PyObject* raised = nullptr;
  HandedOver* outer;
  static thread_local HandedOver* latest;
  // The one that this thread is in.
  static HandedOver& here() {
    if (latest == nullptr) throw std::runtime_error("an operator of the kernels' own was called from outside");
    return *latest;
  }
};
thread_local HandedOver* HandedOver::latest = nullptr;

// An error of Python's on its way through torch's dispatcher, which passes C++'s on; at the border to Python pybind11,
// torch's as well as this module's, asks it to raise itself.
class PythonError : public py::builtin_exception {
 public:
  // Takes over the reference. With the GIL.
  explicit PythonError(PyObject* error)
      : builtin_exception(py::str(py::handle(error))), error_(error, [](PyObject* object) {
          const py::gil_scoped_acquire acquired;
          Py_DECREF(object);
        }) {}

  void set_error() const override { PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error_.get())), error_.get()); }

 private:
  std::shared_ptr<PyObject> error_;
};

template <class Operator>
void call_python(Value* stack, uint64_t arguments, uint64_t results) {
  HandedOver own;
  size_t texts = 0, rest = 0;
  for (uint64_t i = 0; i < arguments; ++i) {
    const Slot slot = Operator::kSlots[i];
    if (slot.kind != Kind::text) {
      stack[rest++] = stack[i];
      continue;
    }
    if (!slot.optional || stack[i] != 0)
      own.texts[texts] = shims::text(slot.optional ? shims::held(stack[i]) : stack[i]);
    ++texts;
    shims::release(stack[i], slot);
  }
  const bool done = shims::call(Operator::kInPython, stack);
  if (own.raised != nullptr) {
    for (uint64_t i = 0; done && i < results; ++i) shims::release(stack[i], {Kind::tensor});
    const py::gil_scoped_acquire acquired;
    throw PythonError(own.raised);
  }
  if (!done) throw std::runtime_error(std::string(Operator::kInPython) + " failed");
}

// What it throws, torch's dispatcher passes on: there is no other way for a kernel to fail.
template <class Operator>
void kernel(Value* stack, uint64_t arguments, uint64_t results) {
  typename Operator::Results found;
  bool served = false;
  try {
    served = Operator::serve(stack, found);
  } catch (const std::exception&) {  // no memory, or torch does not answer: said by Python
  }
  if (!served) return call_python<Operator>(stack, arguments, results);
  for (uint64_t i = 0; i < arguments; ++i) shims::release(stack[i], Operator::kSlots[i]);
  for (size_t i = 0; i < found.size(); ++i) stack[i] = reinterpret_cast<Value>(found[i].handed_on());
}

bool register_operators(const std::string& loaded) {
  return shims::connect(loaded.c_str()) && shims::implement("CPU", "forward", kernel<Forward>) &&
         shims::implement("CPU", "backward", kernel<Backward>);
}

void remember(const std::string& norm, const std::string& backend, const py::object& x, const py::object& owner) {
  View view;
  const Plan& plan = owner.cast<const Plan&>();
  if (plan.native() && torch::view_of(x.ptr(), view) && view.on_cpu())
    known.add({norm, backend, view, plan.residual()}, owner);
}

}  // namespace

void bind_operators(py::module_& module) {
  module.def("register_operators", &register_operators);
  module.def("operator_raised",
             [](const py::object& error) { HandedOver::here().raised = py::object(error).release().ptr(); });
  module.def("operator_texts", [] { return HandedOver::here().texts; });
  module.def("remember", &remember);
  module.def("operator_plans", [] { return known.size(); });
  module.def("operator_calls", [] { return py::make_tuple(forward_calls.load(), backward_calls.load()); });
}

}  // namespace divnorm
