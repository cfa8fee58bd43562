#include "bindings_cuda.h"
#include "bindings_problem.h"
#include "bindings_seam.h"
#include "cuda/seam.h"

namespace py = pybind11;

namespace divnorm {
namespace {

using cuda::Seam;
using Where = std::tuple<int, uintptr_t, Address>;  // device, stream, scratch memory

std::unique_ptr<Seam> make_seam(const py::object& geometry, int dtype, bool channels_last, bool residual, int device,
                                const py::dict& facts, const py::dict& forward, const py::dict& backward) {
  return std::make_unique<Seam>(problem_of(geometry, dtype, channels_last, residual), device, device_of(facts),
                                preferences_of(forward), preferences_of(backward));
}

Place place(const Where& where) {
  const auto [device, stream, scratch] = where;
  return {device, stream, 1, written(scratch)};
}

void statistics(const Seam& seam, Address x, const RowPlaces& rows, const Where& where) {
  ForwardCall call;
  call.tensors = half<ForwardTensors>(Part::first, x, {}, 0);
  call.tensors.mean = written(rows[0]);
  call.tensors.variance = written(rows[1]);
  call.place = place(where);
  seam.forward(call);
}

void normalize(const Seam& seam, Address x, const RowPlaces& rows, const ParameterPlaces& beside, Address residual,
               Address y, Address l1, const Where& where) {
  ForwardCall call;
  call.tensors = half<ForwardTensors>(Part::second, x, beside, residual);
  call.tensors.mean = written(rows[0]);
  call.tensors.rstd = written(rows[1]);
  call.tensors.y = written(y);
  call.l1 = written(l1);
  call.place = place(where);
  seam.forward(call);
}

BackwardCall backward_half(Part part, Address dy, Address l1_scale, Address x, const RowPlaces& rows,
                           const ParameterPlaces& beside, Address residual, const Where& where) {
  BackwardCall call;
  call.tensors = half<BackwardTensors>(part, x, beside, residual);
  call.tensors.dy = read(dy);
  call.tensors.mean = read(rows[0]);
  call.tensors.rstd = read(rows[1]);
  call.dl1 = read(l1_scale);
  call.place = place(where);
  return call;
}

void sums(const Seam& seam, Address dy, Address l1_scale, Address x, const RowPlaces& rows,
          const ParameterPlaces& beside, Address residual, Address out, const ParameterPlaces& gradients,
          const Where& where) {
  BackwardCall call = backward_half(Part::first, dy, l1_scale, x, rows, beside, residual, where);
  call.tensors.sums = written(out);
  call.tensors.dweight = parameter(std::get<0>(gradients));
  call.tensors.dbias = parameter(std::get<1>(gradients));
  call.tensors.dthreshold = parameter(std::get<2>(gradients));
  seam.backward(call);
}

void gradient(const Seam& seam, Address dy, Address l1_scale, Address x, const RowPlaces& rows, Address slopes,
              const ParameterPlaces& beside, Address residual, Address dx, Address dresidual, const Where& where) {
  BackwardCall call = backward_half(Part::second, dy, l1_scale, x, rows, beside, residual, where);
  call.tensors.slopes = read(slopes);
  call.tensors.dx = written(dx);
  call.tensors.dresidual = written(dresidual);
  seam.backward(call);
}

}  // namespace

void bind_seam_cuda(py::module_& module) {
  py::class_<Seam>(module, "CudaSeam", py::module_local())
      .def(py::init(&make_seam))
      .def_property_readonly(
          "scratch_bytes",
          [](const Seam& seam) {
            const auto bytes = [&](Direction direction, Part part) { return seam.scratch_bytes(direction, part); };
            return py::make_tuple(bytes(Direction::forward, Part::first), bytes(Direction::forward, Part::second),
                                  bytes(Direction::backward, Part::first), bytes(Direction::backward, Part::second));
          })
      .def("statistics", &statistics)
      .def("normalize", &normalize)
      .def("sums", &sums)
      .def("gradient", &gradient);
}

}  // namespace divnorm
