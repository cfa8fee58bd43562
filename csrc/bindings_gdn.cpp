#include "bindings_gdn.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "address.h"
#include "cpu/calls.h"

namespace py = pybind11;

namespace divnorm {
namespace {

using Form = std::array<int64_t, 4>;    // dtype, inverse, simplified, x's numel
using Places = std::array<int64_t, 7>;  // blocks, rows, columns; strides: block's and row's of x, and of scratch

GdnPart part_of(const Form& form, const Places& places) {
  GdnPart part;
  part.dtype = static_cast<Dtype>(form[0]);
  part.inverse = form[1] != 0;
  part.simplified = form[2] != 0;
  part.tensor_numel = form[3];
  part.blocks = places[0];
  part.rows = places[1];
  part.columns = places[2];
  part.block_stride = places[3];
  part.row_stride = places[4];
  part.scratch_block_stride = places[5];
  part.scratch_row_stride = places[6];
  return part;
}

void pool(const Form& form, const Places& places, int threads, Address x, Address s) {
  kernels_in_use().gdn->pool(part_of(form, places), threads, read(x), written(s));
}

void forward(const Form& form, const Places& places, int threads, Address x, Address y, Address d) {
  kernels_in_use().gdn->forward(part_of(form, places), threads, read(x), written(y), read(d));
}

void slope(const Form& form, const Places& places, int threads, Address dy, Address x, Address d, Address e,
           Address dd) {
  kernels_in_use().gdn->slope(part_of(form, places), threads, read(dy), read(x), read(d), written(e), written(dd));
}

bool slope_of_result(const Form& form, const Places& places, int threads, Address dy, Address x, Address y, Address s,
                     Address e, Address dd) {
  return kernels_in_use().gdn->slope_of_result(part_of(form, places), threads, read(dy), read(x), read(y), written(s),
                                               written(e), written(dd));
}

void backward(const Form& form, const Places& places, int threads, Address x, Address dx, Address e, Address ds) {
  kernels_in_use().gdn->backward(part_of(form, places), threads, read(x), written(dx), read(e), read(ds));
}

}  // namespace

void bind_gdn(py::module_& module) {
  using Releases = py::call_guard<py::gil_scoped_release>;
  module.def("gdn_pool", &pool, Releases());
  module.def("gdn_forward", &forward, Releases());
  module.def("gdn_slope", &slope, Releases());
  module.def("gdn_slope_of_result", &slope_of_result, Releases());
  module.def("gdn_backward", &backward, Releases());
}

}  // namespace divnorm
