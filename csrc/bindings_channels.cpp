#include "bindings_channels.h"

#include "cpu/calls.h"
#include "memory.h"

namespace py = pybind11;

namespace divnorm {
namespace {

void expect_result(Address result, const ChannelProblem& problem) {
  if (result != 0) prefer_huge_pages(written(result), static_cast<size_t>(problem.numel() * bytes_of(problem.dtype)));
}

void forward(Address x, Address y, int dtype, const ChannelExtents& extents, const ChannelBox& box, bool squared,
             const ChannelNumbers& numbers, Address learned, int threads) {
  const ChannelProblem problem = channel_problem(dtype, extents, box, squared);
  expect_result(y, problem);
  kernels_in_use().channels_forward(problem, channel_forward(x, y, numbers, learned), threads);
}

void backward(Address dy, Address x, Address dx, Address dlearned, int dtype, const ChannelExtents& extents,
              const ChannelBox& box, bool squared, const ChannelNumbers& numbers, Address learned, int threads) {
  const ChannelProblem problem = channel_problem(dtype, extents, box, squared);
  expect_result(dx, problem);
  kernels_in_use().channels_backward(problem, channel_backward(dy, x, dx, dlearned, numbers, learned), threads);
}

}  // namespace

void bind_channels(py::module_& module) {
  module.def("channels_forward", &forward, py::call_guard<py::gil_scoped_release>());
  module.def("channels_backward", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace divnorm
