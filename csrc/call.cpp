// A normalization as Python calls it, from tensors to tensors: Call(norm, backend, form, prepare).
//
// It only ever says yes: whatever is unusual about a call, from a layout that has to be copied to a bad argument, is
// NotImplemented, and Python's way (divnorm_kernels/functional.py), which knows everything, takes over. A call of a
// shape, dtype, format and device for the first time asks `prepare` for a plan and keeps it.
#include "call.h"

#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <exception>
#include <memory>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "plan.h"

namespace divnorm {

namespace py = pybind11;
using torch::View;

namespace {

constexpr int kGiven = 6;           // x, weight, bias, sigma, residual, threshold
constexpr int kSaved = kGiven + 1;  // and the maps
constexpr size_t kMostPlans = 32;   // kept by a call: the shapes of text have no end

struct Kept {
  PlanKey key;
  py::object object;
  const Plan* plan;  // null: none serves such an x
};

struct State {
  py::object norm, backend, form, prepare;
  bool shaped;  // the parameters have shapes of the form's
  std::vector<Kept> plans;
  size_t last = 0;
};

struct Call {
  PyObject_HEAD vectorcallfunc vectorcall;
  State* state;
};

// Of autograd: `apply` of the function whose forward and backward are below.
PyObject* apply = nullptr;

struct Names {
  PyObject *to_save, *materialize, *non_differentiable, *plan, *sigma, *bias_dtype, *needs;
};
Names names;

// From a call to the forward that autograd calls in between, so that nothing is looked at twice.
struct Pending {
  const Kept* kept;
  const Arguments* arguments;
  PyObject* x;
  bool with_l1, with_statistics;
};
thread_local const Pending* pending = nullptr;

PyObject* not_implemented() {
  Py_INCREF(Py_NotImplemented);
  return Py_NotImplemented;
}

// Runs what may throw, at the border to Python.
template <class Body>
PyObject* guarded(Body&& body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// By value: whatever is asked of Python lets other threads run, and change what is kept.
Kept plan_for(State& state, PyObject* x, const View& view, bool residual) {
  const PlanKey key(view, residual);
  if (state.last < state.plans.size() && state.plans[state.last].key == key) return state.plans[state.last];
  for (size_t i = 0; i < state.plans.size(); ++i)
    if (state.plans[i].key == key) return state.plans[state.last = i];
  const py::object made = state.prepare(state.norm, state.backend, state.form, py::handle(x), residual);
  std::vector<Kept> dropped;  // at the end: what they hold may run anything as it goes
  if (state.plans.size() >= kMostPlans) dropped.swap(state.plans);
  state.plans.push_back({key, made, made.is_none() ? nullptr : made.cast<const Plan*>()});
  state.last = state.plans.size() - 1;
  return state.plans.back();
}

bool is_number(PyObject* object) { return PyFloat_CheckExact(object) || PyLong_CheckExact(object); }

// Whether the tensors among these objects are torch's own.
bool all_plain(PyObject* const* objects, int count) {
  return std::all_of(objects, objects + count,
                     [](PyObject* object) { return object == Py_None || is_number(object) || torch::plain(object); });
}

bool differentiates(PyObject* const* objects) {
  return torch::gradients_enabled() && std::any_of(objects, objects + kGiven, [](PyObject* object) {
           return object != Py_None && !is_number(object) && torch::requires_grad(object);
         });
}

template <class... Objects>
py::object tuple_of(Objects... objects) {
  PyObject* made = PyTuple_Pack(sizeof...(objects), objects...);
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// (y, l1, maps) where one of the latter two was asked for, else y.
py::object as_result(const Results& results, bool with_l1, bool with_statistics) {
  if (!with_l1 && !with_statistics) return results.y;
  return tuple_of(results.y.ptr(), results.l1.ptr(), with_statistics ? results.maps.ptr() : Py_None);
}

Given given_of(PyObject* const* objects) {
  return {objects[0], objects[1], objects[2], objects[3], objects[4], objects[5]};
}

py::object call(State& state, PyObject* const* objects, bool with_l1, bool with_statistics) {
  const Given given = given_of(objects);
  Arguments arguments;
  if (!all_plain(objects, kGiven) || !torch::eager() || !torch::view_of(given.x, arguments.x) || arguments.x.numel == 0)
    return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  const Kept kept = plan_for(state, given.x, arguments.x, given.residual != Py_None);
  const Leeway leeway{state.shaped, !state.form.is_none()};
  if (kept.plan == nullptr || !arguments_of(given, arguments) || !kept.plan->fits(arguments, leeway))
    return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  if (!differentiates(objects))
    return as_result(kept.plan->forward(given, arguments, with_l1, with_statistics, with_statistics), with_l1,
                     with_statistics);
  const Pending own{&kept, &arguments, given.x, with_l1, with_statistics};
  // what runs in between, as an object goes, may be a call too
  const Pending* outer = std::exchange(pending, &own);
  PyObject* result = PyObject_Vectorcall(apply, objects, kGiven, nullptr);
  pending = outer;
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

PyObject* vectorcall(PyObject* self, PyObject* const* given, size_t flags, PyObject* keywords) {
  const Py_ssize_t count = PyVectorcall_NARGS(flags);
  if (keywords != nullptr || count < 4 || count > 8) {
    PyErr_SetString(PyExc_TypeError,
                    "a call takes x, weight, bias, sigma, with_l1=False, with_statistics=False, residual=None, "
                    "threshold=None");
    return nullptr;
  }
  for (Py_ssize_t i = 4; i < count && i < 6; ++i)
    if (!PyBool_Check(given[i])) return not_implemented();
  const auto flag = [&](Py_ssize_t i) { return count > i && given[i] == Py_True; };
  const auto optional = [&](Py_ssize_t i) { return count > i ? given[i] : Py_None; };
  PyObject* const objects[kGiven] = {given[0], given[1], given[2], given[3], optional(6), optional(7)};
  return guarded(
      [&] { return call(*reinterpret_cast<Call*>(self)->state, objects, flag(4), flag(5)).release().ptr(); });
}

void set(PyObject* owner, PyObject* name, PyObject* value) {
  if (PyObject_SetAttr(owner, name, value) != 0) throw py::error_already_set();
}

// forward(ctx, x, weight, bias, sigma, residual, threshold) of the autograd function.
PyObject* forward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    const Pending* own = std::exchange(pending, nullptr);
    if (own == nullptr || count != 1 + kGiven || given[1] != own->x)
      throw std::runtime_error("forward: not called by a Call");
    PyObject* ctx = given[0];
    const auto [x, weight, bias, sigma, residual, threshold] = given_of(given + 1);
    const Plan& plan = *own->kept->plan;
    const Results results =
        plan.forward(given_of(given + 1), *own->arguments, own->with_l1, own->with_statistics, true);
    const bool number = is_number(sigma);
    const auto read_again = [&](PyObject* object) { return plan.activates() ? object : Py_None; };
    set(ctx, names.to_save,
        tuple_of(x, weight, read_again(bias), number ? Py_None : sigma, read_again(residual), threshold,
                 results.maps.ptr())
            .ptr());
    set(ctx, names.materialize, Py_False);
    set(ctx, names.plan, own->kept->object.ptr());
    if (number) set(ctx, names.sigma, sigma);
    if (bias != Py_None) set(ctx, names.bias_dtype, torch::dtype_of(bias).ptr());
    if (own->with_statistics) set(ctx, names.non_differentiable, tuple_of(results.maps.ptr()).ptr());
    return as_result(results, own->with_l1, own->with_statistics).release().ptr();
  });
}

// backward(ctx, saved, dy, dl1): the gradients for what forward was given, or NotImplemented.
PyObject* backward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    if (count != 4 || !PyTuple_Check(given[1]) || PyTuple_GET_SIZE(given[1]) != kSaved)
      throw std::runtime_error("backward: not called by the function of a Call");
    PyObject *ctx = given[0], *saved = given[1];
    if (!all_plain(given + 2, 2) || !torch::eager() || torch::gradients_enabled()) return not_implemented();
    const py::object object = torch::attribute(ctx, names.plan), needed = torch::attribute(ctx, names.needs);
    PyObject* const* tensors = PySequence_Fast_ITEMS(saved);
    if (!all_plain(tensors, kSaved)) return not_implemented();
    const py::object sigma =
        tensors[3] == Py_None ? torch::attribute(ctx, names.sigma) : py::reinterpret_borrow<py::object>(tensors[3]);
    Needs needs;
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = PySequence_Fast_GET_ITEM(needed.ptr(), i) == Py_True;
    Gradients gradients;
    const Saved found{{tensors[0], tensors[1], tensors[2], sigma.ptr(), tensors[4], tensors[5]}, tensors[kGiven]};
    // of a bias whose gradient is all that is needed of it
    const py::object dtype = needs[2] && tensors[2] == Py_None ? torch::attribute(ctx, names.bias_dtype) : py::none();
    if (!object.cast<const Plan*>()->backward(given[2], given[3], found, dtype.ptr(), needs, gradients))
      return not_implemented();
    return std::apply([](const auto&... one) { return tuple_of(one.ptr()...); }, gradients).release().ptr();
  });
}

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject*) {
  PyObject *norm, *backend, *form, *prepare;
  if (!PyArg_ParseTuple(arguments, "OOOO", &norm, &backend, &form, &prepare)) return nullptr;
  return guarded([&]() -> PyObject* {
    const auto borrowed = [](PyObject* object) { return py::reinterpret_borrow<py::object>(object); };
    const bool shaped = form != Py_None && py::handle(form).attr("shapes_parameters").cast<bool>();
    auto state = std::make_unique<State>(
        State{borrowed(norm), borrowed(backend), borrowed(form), borrowed(prepare), shaped, {}});
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) throw py::error_already_set();
    auto* own = reinterpret_cast<Call*>(self);
    own->vectorcall = vectorcall;
    own->state = state.release();
    return self;
  });
}

void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<Call*>(self)->state;
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Call, vectorcall), READONLY, nullptr},
                         {nullptr, 0, 0, 0, nullptr}};

template <class Function>
PyType_Slot slot(int id, Function function) {
  return {id, reinterpret_cast<void*>(function)};
}

PyType_Slot slots[] = {slot(Py_tp_new, make),
                       slot(Py_tp_dealloc, destroy),
                       slot(Py_tp_members, members),
                       slot(Py_tp_call, PyVectorcall_Call),
                       {0, nullptr}};

PyType_Spec spec = {"divnorm_kernels._native.Call", sizeof(Call), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
                    slots};

PyMethodDef functions[] = {
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward)), METH_FASTCALL, nullptr},
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(backward)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

}  // namespace

void bind_call(py::module_& module) {
  module.attr("Call") = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
  names = {interned("to_save"), interned("materialize_grads"), interned("non_differentiable"), interned("plan"),
           interned("sigma"),   interned("bias_dtype"),        interned("needs_input_grad")};
  module.def("differentiate_by", [](const py::object& function) { apply = py::object(function).release().ptr(); });
}

}  // namespace divnorm
