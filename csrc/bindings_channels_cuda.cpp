#include "bindings_cuda.h"

#include "bindings_channels.h"
#include "cuda/channels.h"

namespace py = pybind11;

namespace divnorm {
namespace {

std::unique_ptr<cuda::Channels> make_channels(int dtype, const ChannelExtents& extents, const ChannelBox& box,
                                              bool squared, int device, const py::dict& facts) {
  return std::make_unique<cuda::Channels>(channel_problem(dtype, extents, box, squared), device, device_of(facts));
}

void forward(const cuda::Channels& channels, Address x, Address y, const ChannelNumbers& numbers, Address learned,
             Address scratch, uintptr_t stream) {
  channels.forward(channel_forward(x, y, numbers, learned), written(scratch), stream);
}

void backward(const cuda::Channels& channels, Address dy, Address x, Address dx, Address dlearned,
              const ChannelNumbers& numbers, Address learned, Address scratch, uintptr_t stream) {
  channels.backward(channel_backward(dy, x, dx, dlearned, numbers, learned), written(scratch), stream);
}

// How a direction is cut: for tests, nothing is launched.
py::dict cut_of(const cuda::Channels& channels, bool backward) {
  const cuda::ChannelCut& cut = channels.cut_of(backward ? Direction::backward : Direction::forward);
  py::dict out;
  out["far"] = cut.far;
  out["positions"] = cut.positions;
  out["stretches"] = cut.stretches;
  out["segment"] = cut.segment;
  out["segments"] = cut.segments;
  out["tiles"] = cut.tiles;
  out["blocks"] = cut.blocks;
  out["threads"] = cut.threads;
  out["shared_bytes"] = cut.shared_bytes;
  return out;
}

}  // namespace

void bind_channels_cuda(py::module_& module) {
  module.attr("cuda_most_channels") = cuda::kMostChannels;
  py::class_<cuda::Channels>(module, "CudaChannels", py::module_local())
      .def(py::init(&make_channels))
      .def_property_readonly("scratch_bytes",
                             [](const cuda::Channels& channels) {
                               return py::make_tuple(channels.scratch_bytes(Direction::forward),
                                                     channels.scratch_bytes(Direction::backward));
                             })
      .def("cut", &cut_of, py::arg("backward"))
      .def("forward", &forward)
      .def("backward", &backward);
}

}  // namespace divnorm
