// What the kernels' blocks have in common: their shared memory, and single numbers at the end of a block's work.
#pragma once

#include "finish.h"
#include "pixels.h"
#include "planes.h"

namespace divnorm::cuda {

template <class T, bool ChannelsLast, Form F>
using Work = std::conditional_t<ChannelsLast, Pixels<T, F>, Planes<T, F>>;

// What lies `offset` bytes from the start of shared memory; null where it is negative.
template <class V>
__device__ V* in_shared(int offset) {
  return offset < 0 ? nullptr : reinterpret_cast<V*>(device::shared_memory() + offset);
}
// The same of what is there, or not looked at.
template <class V>
__device__ V* surely_in_shared(int offset) {
  return reinterpret_cast<V*>(device::shared_memory() + offset);
}

// The parameters of a block and their gradients. What the plain form has none of is null, to the compiler too.
template <class T, Form F>
__device__ Affine<T> affine_of(const Shape& shape, const SharedLayout& shared, T* residual) {
  using A = Acc<T>;
  constexpr bool kGeneral = F == Form::general;
  return {in_shared<A>(shared.weight),
          in_shared<A>(shared.bias),
          kGeneral ? in_shared<A>(shared.threshold) : nullptr,
          in_shared<A>(shared.dweight),
          in_shared<A>(shared.dbias),
          kGeneral ? in_shared<A>(shared.dthreshold) : nullptr,
          residual,
          shape.per_position,
          shape.activation};
}

// A block's shared memory by name, as far as it is the same for every kernel but the pipelined ones.
template <class T, Form F>
struct Memory {
  using A = Acc<T>;
  static constexpr bool kGeneral = F == Form::general;

  __device__ Memory(const Shape& shape, const SharedLayout& shared)
      : x(in_shared<T>(shared.x)),
        dy(in_shared<T>(shared.dy)),
        residual(kGeneral ? in_shared<T>(shared.residual) : nullptr),
        partial(in_shared<A>(shared.partial)),
        owned(in_shared<A>(shared.owned)),
        reduction(in_shared<A>(shared.reduction)),
        totals(in_shared<A>(shared.totals)),
        pitch(shared.pitch),
        local{in_shared<A>(shared.local), in_shared<A>(shared.local) + pitch, partial, partial + pitch, shape.slope_of,
              absolute<F>(shape),         kGeneral && shape.keeps_mean},
        affine(affine_of<T, F>(shape, shared, residual)) {}

  T *x, *dy, *residual;
  A *partial, *owned, *reduction, *totals;
  int pitch;
  Local<A> local;  // of forward all of it, of backward slope and offset lie where the partial statistics did
  Affine<T> affine;
};

template <class A, class Team = WholeBlock>
__device__ void fill(A* to, int count, A value, const Team& team = {}) {
  for (int i = team.index(); i < count; i += team.count()) to[i] = value;
}

// A map at the tile's positions, or its neutral value where the field is absent.
template <class A, class Maps>
__device__ void fetch(const Maps& maps, int map, bool present, A neutral, const Tile& tile, A* to) {
  if (!present) return fill(to, tile.positions, neutral);
  if constexpr (Maps::kElsewhere)
    if (maps.saved.step == 0) return fill(to, tile.positions, maps.anywhere(map, 0));
  for (int p = device::thread(); p < tile.positions; p += device::threads())
    to[p] = maps.anywhere(map, maps.saved.step * (tile.position + p));
}

// The sum of every thread's value as one number of the partial sums.
template <class A>
__device__ void store_sum(void* partials, int64_t slot, A value, A* reduction) {
  if (partials == nullptr) return;
  const A sum = block_sum(value, reduction);
  if (device::thread() == 0) device::store(static_cast<A*>(partials) + slot, sum);
}

// dsigma of a block as the sums over blocks take it: with sigma's sign for p = 1 and, of whole fields, with all of what
// sigma brings; else that is theirs to multiply.
template <Form F, class A>
__device__ A signed_dsigma(const Arguments& args, int group, A dsigma) {
  if (!absolute<F>(args.shape) || args.shape.whole || args.partials.dsigma == nullptr) return dsigma;
  return dsigma * signed_as(A(1), sigma_of<A>(args.tensors, group));
}

// What |v| adds to the gradient of v.
template <class A>
__device__ A l1_gradient(const Tensors& tensors) {
  if (tensors.dl1 == nullptr) return A(0);
  return device::load(static_cast<const A*>(tensors.dl1)) / static_cast<A>(tensors.l1_numbers);
}

// Count, mean and sum of squares about it of numbers, and of rows x columns sets of them, set(row, column) for each.
template <class A>
struct Moments {
  A count, mean, squares;

  template <class Set>
  static __device__ Moments merged(int rows, int columns, Set&& set) {
    A total = 0, mean = 0, rest = 0, squares = 0;
    for (int row = 0; row < rows; ++row)
      for (int column = 0; column < columns; ++column) {
        const Moments one = set(row, column);
        total += one.count;
        if (one.count > A(0)) mean += one.count * one.mean;
      }
    mean /= total;
    for (int row = 0; row < rows; ++row)
      for (int column = 0; column < columns; ++column) {
        const Moments one = set(row, column);
        const A difference = one.mean - mean;
        if (one.count > A(0)) {
          rest += one.count * difference;
          squares += one.squares + one.count * difference * difference;
        }
      }
    return {total, corrected(mean, rest / total), squares};
  }
};

// What the backward maps start from, given the sums over the channels; returns P2 rstd^3, for p = 1 P2 rstd^2.
template <Form F, class A, class Maps>
__device__ A start_backward(const Shape& shape, const Maps& maps, int p, A scale, A shift, A centred) {
  const A rstd = shape.suppression.present ? maps.load(backward_map::rstd, p) : A(0);
  A whole = (scale * rstd) * rstd, start;  // powers of rstd alone overflow
  if (absolute<F>(shape))
    start = A(kDeviationScale) * whole;
  else
    start = whole *= rstd;
  if (shape.suppression.present)
    maps.store(backward_map::scale, p, start / divisor<A>(shape, shape.suppression, p));
  else
    shift /= divisor<A>(shape, shape.summation, p);
  maps.store(backward_map::shift, p, shift);
  maps.store(backward_map::centred_sum, p, centred);
  return whole;
}

}  // namespace divnorm::cuda
