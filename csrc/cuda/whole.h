// Whole fields: the statistics of a row are two numbers, so those of its positions are merged and nothing is summed
// over windows. Blocks merge what they have; one block of a row merges the blocks.
#pragma once

#include "block.h"

namespace divnorm::cuda {

// A sum over a team that every thread of it receives.
template <class A, class Team = WholeBlock>
__device__ A shared_sum(A value, A* reduction, const Team& team = {}) {
  const A sum = block_sum(value, reduction, team);
  team.sync();
  if (team.index() == 0) reduction[0] = sum;
  team.sync();
  const A all = reduction[0];
  team.sync();
  return all;
}

// The moments of `sets` sets of numbers, set(i) for each, merged by a team; every thread of it receives them.
template <class A, class Set, class Team = WholeBlock>
__device__ Moments<A> block_moments(int sets, A* reduction, Set&& set, const Team& team = {}) {
  A total = 0, mean = 0, rest = 0, squares = 0;
  for (int i = team.index(); i < sets; i += team.count()) {
    const Moments<A> one = set(i);
    total += one.count;
    if (one.count > A(0)) mean += one.count * one.mean;
  }
  total = shared_sum(total, reduction, team);
  mean = shared_sum(mean, reduction, team) / total;
  for (int i = team.index(); i < sets; i += team.count()) {
    const Moments<A> one = set(i);
    if (!(one.count > A(0))) continue;
    const A difference = one.mean - mean;
    rest += one.count * difference;
    squares += one.squares + one.count * difference * difference;
  }
  rest = shared_sum(rest, reduction, team);
  return {total, corrected(mean, rest / total), shared_sum(squares, reduction, team)};
}

template <class A>
__device__ void keep_totals(A* to, A first, A second, A third) {
  if (device::thread() != 0) return;
  device::store(to, first);
  device::store(to + 1, second);
  device::store(to + 2, third);
}

// Ends forward for a row, by one thread; for p = 1 what leads to the mean.
template <Form F, class A, class Maps>
__device__ void save_statistics(const Arguments& args, const Maps& maps, int group, const Moments<A>& row) {
  if (args.shape.summation.present) maps.save(forward_map::mean, 0, row.mean);
  if (!args.shape.suppression.present || absolute<F>(args.shape)) return;
  const A variance = row.squares / row.count;
  maps.save(forward_map::rstd, 0, rstd_of<F>(args.shape, sigma_of<A>(args.tensors, group), variance));
  if (maps.saved.variance != nullptr) device::store(maps.saved.variance, variance);
}

// The numbers of a row.
template <class A>
__device__ A row_count(const Shape& shape) {
  const A samples = shape.over_batch ? static_cast<A>(shape.batch) : A(1);
  return samples * static_cast<A>(shape.group_channels) * static_cast<A>(shape.positions);
}

// Ends forward for a row with p = 1, by one thread, given the sum of |v|.
template <class A, class Maps>
__device__ void save_deviation(const Arguments& args, const Maps& maps, int group, A sum) {
  const A average = sum / row_count<A>(args.shape), deviation = A(kDeviationScale) * average;
  maps.save(forward_map::rstd, 0, rstd_of<Form::general>(args.shape, sigma_of<A>(args.tensors, group), average));
  if (maps.saved.variance != nullptr) device::store(maps.saved.variance, deviation * deviation);
}

// slope (of v/s, for p = 1 of the signs of v) and offset of a row from the sums over it of g v (scale), of P1 rstd +
// l1's share (shift) and of the signs (centred), by one thread; returns sigma P2 rstd^3, for p = 1 sign(sigma) P2
// rstd^2. The sum of v is zero where a mean is subtracted, that of the signs is not.
template <Form F, class A, class Maps>
__device__ A save_slopes(const Arguments& args, const Maps& maps, int group, A scale, A shift, A centred) {
  const Shape& shape = args.shape;
  const A count = row_count<A>(shape);
  A whole = 0;
  if (shape.suppression.present) {
    const A rstd = maps.load(backward_map::rstd, 0);
    const A normal = scale * rstd, sigma = args.partials.dsigma == nullptr ? A(0) : sigma_of<A>(args.tensors, group);
    A slope = normal / count * rstd;
    if (absolute<F>(shape)) {
      slope *= A(kDeviationScale);
      shift -= slope * centred;
      whole = normal * rstd * signed_as(A(1), sigma);
    } else {
      whole = normal * rstd * (rstd * sigma);
    }
    maps.store(backward_map::slope, 0, slope);
  }
  if (shape.summation.present) maps.store(backward_map::offset, 0, shift / count);
  return whole;
}

}  // namespace divnorm::cuda
