#include "bindings_cuda.h"

#include <string>

#include "bindings_problem.h"
#include "cuda/call.h"
#include "cuda/channels_program.h"

namespace py = pybind11;

namespace divnorm {

cuda::Device device_of(const py::dict& facts) {
  cuda::Device device;
  device.multiprocessors = facts["multiprocessors"].cast<int>();
  device.cache_bytes = facts["cache_bytes"].cast<int64_t>();
  device.shared_bytes = facts["shared_bytes"].cast<int>();
  device.block_shared_bytes = facts["block_shared_bytes"].cast<int>();
  device.clusters = facts["clusters"].cast<bool>();
  return device;
}

cuda::Preferences preferences_of(const py::dict& row) {
  cuda::Preferences p;
  p.cluster = row["cluster"].cast<int>();
  p.blocks = row["blocks"].cast<int>();
  p.threads = row["threads"].cast<int>();
  p.bytes_per_thread = row["bytes_per_thread"].cast<int>();
  p.slice_channels = row["slice_channels"].cast<int>();
  p.stretch_bytes = row["stretch_bytes"].cast<int>();
  p.window_rounds = row["window_rounds"].cast<int>();
  p.staged_threads = row["staged_threads"].cast<int>();
  p.tile_bytes = row["tile_bytes"].cast<int>();
  p.tile_positions = row["tile_positions"].cast<int>();
  p.row_positions = row["row_positions"].cast<int>();
  p.items = row["items"].cast<int>();
  p.cache_share = row["cache_share"].cast<double>();
  p.finish_inside = row["finish_inside"].cast<int>();
  p.pipeline = row["pipeline"].cast<int>();
  return p;
}

namespace {

// What is chosen on a device of these properties: for tests and reports, nothing is launched.
py::dict strategy_of(const py::object& geometry, int dtype, bool channels_last, bool backward, const py::dict& device,
                     const py::dict& row, bool residual) {
  const Problem problem = problem_of(geometry, dtype, channels_last, residual);
  const cuda::Strategy s =
      cuda::choose(backward ? problem.in_backward() : problem, backward ? Direction::backward : Direction::forward,
                   preferences_of(row), device_of(device));
  py::dict out;
  out["name"] = s.name();
  out["blocks"] = s.blocks;
  out["cluster"] = s.cluster;
  out["threads"] = s.threads;
  out["shared_bytes"] = s.arguments.shared.bytes;
  out["scratch_bytes"] = s.scratch.bytes;
  const bool staged = s.method == cuda::Method::staged;
  out["slices"] = staged ? s.arguments.staged.slices.count : s.arguments.resident.slices.count;
  out["summing_blocks"] = s.summing_blocks;
  out["slots"] = backward ? s.scratch.affine_slots : s.scratch.l1_slots;
  const cuda::Pipeline& pipeline = s.arguments.pipeline;
  if (s.method == cuda::Method::pipelined) {
    out["ring"] = py::make_tuple(pipeline.slots, pipeline.chunks, pipeline.again_slots);
    out["vector"] = py::make_tuple(pipeline.vector, 1 << pipeline.period);
    out["box"] = pipeline.boxes[0].rows;
  }
  out["tile"] = staged ? py::make_tuple(s.arguments.staged.tile_channels, s.arguments.staged.tile_positions)
                       : py::make_tuple(s.arguments.resident.tile_channels, s.arguments.resident.tile_positions);
  return out;
}

std::unique_ptr<cuda::Calls> make_calls(const py::object& geometry, int dtype, bool channels_last, bool residual,
                                        int device, const py::dict& facts, const py::dict& forward,
                                        const py::dict& backward) {
  return std::make_unique<cuda::Calls>(problem_of(geometry, dtype, channels_last, residual), device, device_of(facts),
                                       preferences_of(forward), preferences_of(backward));
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.attr("cuda_most_positions") = cuda::kMostPositions;
  py::dict compiled_for;  // most threads of a block, blocks of a multiprocessor
  compiled_for["pipelined"] = py::make_tuple(cuda::kPipelinedThreads, 1);
  compiled_for["resident"] = py::make_tuple(cuda::kResidentThreads, cuda::kResidentBlocks);
  compiled_for["staged"] = py::make_tuple(cuda::kStagedThreads, cuda::kStagedBlocks);
  compiled_for["seam"] = compiled_for["staged"];
  compiled_for["channels"] = py::make_tuple(cuda::kChannelThreads, cuda::kChannelBlocks);
  module.attr("cuda_compiled_for") = compiled_for;
  module.def("cuda_versions", [] {
    const cuda::Versions found = cuda::versions();
    return py::make_tuple(found.driver, found.runtime);
  });
  module.def("cuda_strategy", &strategy_of, py::arg("geometry"), py::arg("dtype"), py::arg("channels_last"),
             py::arg("backward"), py::arg("device"), py::arg("row"), py::arg("residual") = false);
  py::class_<cuda::Calls>(module, "CudaCalls", py::module_local())
      .def(py::init(&make_calls))
      .def_property_readonly(
          "capsule", [](const cuda::Calls& calls) { return capsule_of(static_cast<const divnorm::Calls*>(&calls)); })
      .def_property_readonly("scratch_bytes",
                             [](const cuda::Calls& calls) {
                               return py::make_tuple(calls.scratch_bytes(Direction::forward),
                                                     calls.scratch_bytes(Direction::backward));
                             })
      .def_property_readonly("strategies", [](const cuda::Calls& calls) {
        return py::make_tuple(calls.strategy(Direction::forward), calls.strategy(Direction::backward));
      });
  bind_channels_cuda(module);
  bind_seam_cuda(module);
}

}  // namespace divnorm
