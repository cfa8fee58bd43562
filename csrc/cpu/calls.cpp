#include "calls.h"

#include <atomic>
#include <initializer_list>

#include "../memory.h"

namespace divnorm {
namespace {

std::atomic<const CpuKernels*>& in_use() {
  static std::atomic<const CpuKernels*> kernels{kernels_for(nullptr)};
  return kernels;
}

size_t bytes_of(const Problem& problem) { return static_cast<size_t>(problem.numel() * bytes_of(problem.dtype)); }

}  // namespace

const CpuKernels& kernels_in_use() { return *in_use().load(); }
void use(const CpuKernels& kernels) { in_use() = &kernels; }

void CpuCalls::forward(const ForwardCall& call) const {
  ForwardTensors tensors = call.tensors;
  double sigma = call.sigma_value, l1 = 0;
  if (tensors.sigma.data == nullptr) tensors.sigma = {&sigma, Dtype::float64, 1};
  tensors.l1 = call.l1 == nullptr ? nullptr : &l1;
  prefer_huge_pages(tensors.y, bytes_of(problem_));
  kernels_in_use().forward(problem_, tensors, call.place.threads);
  if (call.l1 == nullptr) return;
  if (problem_.dtype == Dtype::float64)
    *static_cast<double*>(call.l1) = l1;
  else
    *static_cast<float*>(call.l1) = static_cast<float>(l1);
}

void CpuCalls::backward(const BackwardCall& call) const {
  BackwardTensors tensors = call.tensors;
  if (call.dl1 != nullptr)
    tensors.dl1 =
        problem_.dtype == Dtype::float64 ? *static_cast<const double*>(call.dl1) : *static_cast<const float*>(call.dl1);
  for (void* written : {tensors.dx, tensors.dresidual})
    if (written != nullptr) prefer_huge_pages(written, bytes_of(problem_));
  kernels_in_use().backward(problem_.in_backward(), tensors, call.place.threads);
}

}  // namespace divnorm
