// Compiled once per instruction set; DIVNORM_ISA names the set and the namespace, DIVNORM_ISA_NAME is its name as text.
#include "entries.h"

#include "whole_calls.h"
#include "window_calls.h"

namespace divnorm::DIVNORM_ISA {

namespace {

template <class T>
void forward_of(const Problem& problem, const ForwardTensors& tensors, int threads) {
  (problem.whole ? whole_forward<T> : window_forward<T>)(problem, tensors, threads);
}

template <class T>
void backward_of(const Problem& problem, const BackwardTensors& tensors, int threads) {
  (problem.whole ? whole_backward<T> : window_backward<T>)(problem, tensors, threads);
}

}  // namespace

void forward(const Problem& problem, const ForwardTensors& tensors, int threads) {
  switch (problem.dtype) {
    case Dtype::float64: return forward_of<double>(problem, tensors, threads);
    case Dtype::float32: return forward_of<float>(problem, tensors, threads);
    case Dtype::bfloat16: return forward_of<BFloat16>(problem, tensors, threads);
    case Dtype::float16: return forward_of<Float16>(problem, tensors, threads);
  }
}

void backward(const Problem& problem, const BackwardTensors& tensors, int threads) {
  switch (problem.dtype) {
    case Dtype::float64: return backward_of<double>(problem, tensors, threads);
    case Dtype::float32: return backward_of<float>(problem, tensors, threads);
    case Dtype::bfloat16: return backward_of<BFloat16>(problem, tensors, threads);
    case Dtype::float16: return backward_of<Float16>(problem, tensors, threads);
  }
}

}  // namespace divnorm::DIVNORM_ISA
