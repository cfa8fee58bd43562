#include "bindings_cuda.h"

#include <string>

#include "addresses.h"
#include "cuda/call.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace divnorm {
namespace {

using cuda::Call;
using cuda::Calls;
using cuda::Direction;

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
  return p;
}

// What is chosen for the plan on a device of these properties: for tests and reports, nothing is launched.
py::dict strategy_of(const Plan& plan, bool backward, const py::dict& device, const py::dict& row) {
  const cuda::Strategy s = cuda::choose(plan.problem(), backward ? Direction::backward : Direction::forward,
                                        preferences_of(row), device_of(device));
  py::dict out;
  out["name"] = s.name();
  out["blocks"] = s.blocks;
  out["cluster"] = s.cluster;
  out["threads"] = s.threads;
  out["shared_bytes"] = s.arguments.shared.bytes;
  out["scratch_bytes"] = s.scratch.bytes;
  out["tile"] = s.resident ? py::make_tuple(s.arguments.resident.tile_channels, s.arguments.resident.tile_positions)
                           : py::make_tuple(s.arguments.staged.tile_channels, s.arguments.staged.tile_positions);
  return out;
}

std::unique_ptr<Calls> make_calls(const Plan& plan, int device, const py::dict& facts, const py::dict& forward,
                                  const py::dict& backward) {
  return std::make_unique<Calls>(plan, device, device_of(facts), preferences_of(forward), preferences_of(backward));
}

void forward(const Calls& calls, int device, Address stream, Address x, Address weight, int weight_dtype, Address bias,
             int bias_dtype, Address sigma, int sigma_dtype, int64_t sigma_count, double sigma_value, Address y,
             Address maps, bool with_variance, Address l1, Address scratch) {
  const Problem& problem = calls.problem();
  const Maps rows(problem, maps, with_variance);
  Call call;
  call.tensors.x = at<void>(x);
  call.tensors.out = at<void>(y);
  call.tensors.weight = parameter(weight, weight_dtype, problem.affine_size());
  call.tensors.bias = parameter(bias, bias_dtype, problem.affine_size());
  call.tensors.sigma = parameter(sigma, sigma_dtype, sigma_count);
  call.tensors.sigma_value = sigma_value;
  call.tensors.mean = rows.mean;
  call.tensors.rstd = rows.rstd;
  call.tensors.variance = rows.variance;
  call.l1 = at<void>(l1);
  call.scratch = at<void>(scratch);
  call.stream = {device, stream};
  const py::gil_scoped_release release;
  calls.run(Direction::forward, call);
}

void backward(const Calls& calls, int device, Address stream, Address x, Address dy, Address maps, Address weight,
              int weight_dtype, Address bias, int bias_dtype, Address sigma, int sigma_dtype, int64_t sigma_count,
              double sigma_value, Address dl1, Address dx, Address dweight, Address dbias, Address dsigma,
              Address scratch) {
  const Problem& problem = calls.problem();
  const Maps both(problem, maps);
  Call call;
  call.tensors.x = at<void>(x);
  call.tensors.dy = at<void>(dy);
  call.tensors.out = at<void>(dx);
  call.tensors.weight = parameter(weight, weight_dtype, problem.affine_size());
  call.tensors.bias = parameter(bias, bias_dtype, problem.affine_size());
  call.tensors.sigma = parameter(sigma, sigma_dtype, sigma_count);
  call.tensors.sigma_value = sigma_value;
  call.tensors.mean = both.mean;
  call.tensors.rstd = both.rstd;
  call.tensors.dl1 = at<void>(dl1);
  call.dweight = parameter(dweight, weight_dtype, problem.affine_size());
  call.dbias = parameter(dbias, bias_dtype, problem.affine_size());
  call.dsigma = parameter(dsigma, sigma_dtype, sigma_count);
  call.scratch = at<void>(scratch);
  call.stream = {device, stream};
  const py::gil_scoped_release release;
  calls.run(Direction::backward, call);
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.attr("cuda_most_positions") = cuda::kMostPositions;
  py::dict compiled_for;  // most threads of a block, blocks of a multiprocessor
  compiled_for["resident"] = py::make_tuple(cuda::kResidentThreads, cuda::kResidentBlocks);
  compiled_for["staged"] = py::make_tuple(cuda::kStagedThreads, cuda::kStagedBlocks);
  module.attr("cuda_compiled_for") = compiled_for;
  module.def("cuda_versions", [] {
    const cuda::Versions found = cuda::versions();
    return py::make_tuple(found.driver, found.runtime);
  });
  module.def("cuda_strategy", &strategy_of);
  py::class_<Calls>(module, "CudaCalls", py::module_local())
      .def(py::init(&make_calls), py::keep_alive<1, 2>())
      .def_property_readonly("scratch_bytes",
                             [](const Calls& calls) {
                               return py::make_tuple(calls.scratch_bytes(Direction::forward),
                                                     calls.scratch_bytes(Direction::backward));
                             })
      .def_property_readonly("strategies",
                             [](const Calls& calls) {
                               return py::make_tuple(calls.strategy(Direction::forward),
                                                     calls.strategy(Direction::backward));
                             })
      .def("forward", &forward)
      .def("backward", &backward);
}

}  // namespace divnorm
