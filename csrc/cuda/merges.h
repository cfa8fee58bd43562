// What several items of the two-pass kernels have found, merged to what it is of a row: over the batch, and of whole
// fields.
#pragma once

#include "items.h"

namespace divnorm::cuda {

// Over the batch: the statistics of all units become those of the batch, for the positions of a tile.
template <class A>
__device__ void forward_merge(const Arguments& args, const Item& item) {
  const Shape& shape = args.shape;
  const StatisticsItem at(args, item);
  const auto maps = maps_of_row<A>(args, kForwardScratchMaps, at.group);
  for (int p = at.position + device::thread(); p < at.position + at.positions; p += device::threads()) {
    const auto whole = Moments<A>::merged(1, args.staged.units, [&](int, int unit) {
      const Samples samples(shape, args.staged, item.chunk, unit, args.staged.unit_samples);
      if (samples.begin >= samples.end) return Moments<A>{0, 0, 0};
      return Moments<A>{static_cast<A>(samples.end - samples.begin) * static_cast<A>(shape.group_channels),
                        device::load(merged_at<A>(args, 0, kForwardStatistics, unit, at.group, p)),
                        device::load(merged_at<A>(args, 1, kForwardStatistics, unit, at.group, p))};
    });
    maps.store(forward_map::mean_of_channels, p, whole.mean);
    maps.store(forward_map::squares, p, whole.squares / whole.count);
  }
}

// The same of p = 1: the sums of |v|.
template <class A>
__device__ void merge_deviations(const Arguments& args, const Item& item) {
  const Shape& shape = args.shape;
  const StatisticsItem at(args, item);
  const auto maps = maps_of_row<A>(args, kForwardScratchMaps, at.group);
  const A count = static_cast<A>(shape.batch) * static_cast<A>(shape.group_channels);
  for (int p = at.position + device::thread(); p < at.position + at.positions; p += device::threads()) {
    A sum = 0;
    for (int unit = 0; unit < args.staged.units; ++unit) {
      const Samples samples(shape, args.staged, item.chunk, unit, args.staged.unit_samples);
      if (samples.begin < samples.end)
        sum += device::load(merged_at<A>(args, 0, kForwardStatistics, unit, at.group, p));
    }
    maps.store(forward_map::squares, p, sum / count);
  }
}

// Of whole fields: the totals of all tiles of a row.
template <class T, Form F>
__device__ void forward_merge_whole(const Arguments& args, const Memory<T, F>& memory, const Item& item) {
  using A = Acc<T>;
  const WholeRow row(args, item);
  if (row.sample >= args.shape.batch) return;
  const auto all = block_moments(row.parts(args), memory.reduction, [&](int part) {
    const A* totals = row.totals<A>(args, part);
    return Moments<A>{device::load(totals), device::load(totals + 1), device::load(totals + 2)};
  });
  if (device::thread() == 0)
    save_statistics<F>(args, maps_of_row<A>(args, kForwardScratchMaps, row_of(args.shape, row.sample, row.group)),
                       row.group, all);
}

template <class T>
__device__ void merge_deviations_whole(const Arguments& args, const Memory<T, Form::general>& memory,
                                       const Item& item) {
  using A = Acc<T>;
  const WholeRow row(args, item);
  if (row.sample >= args.shape.batch) return;
  A sum = 0;
  for (int part = device::thread(); part < row.parts(args); part += device::threads())
    sum += device::load(row.totals<A>(args, part));
  sum = shared_sum(sum, memory.reduction);
  if (device::thread() == 0)
    save_deviation(args, maps_of_row<A>(args, kForwardScratchMaps, row_of(args.shape, row.sample, row.group)),
                   row.group, sum);
}

template <class T, Form F>
__device__ void backward_merge_whole(const Arguments& args, const Memory<T, F>& memory, const Item& item) {
  using A = Acc<T>;
  const WholeRow row(args, item);
  if (row.sample >= args.shape.batch) return;
  A scale = 0, shift = 0, centred = 0;
  for (int part = device::thread(); part < row.parts(args); part += device::threads()) {
    const A* totals = row.totals<A>(args, part);
    scale += device::load(totals);
    shift += device::load(totals + 1);
    if (absolute<F>(args.shape)) centred += device::load(totals + 2);
  }
  scale = shared_sum(scale, memory.reduction);
  shift = shared_sum(shift, memory.reduction);
  if (absolute<F>(args.shape)) centred = shared_sum(centred, memory.reduction);
  if (device::thread() != 0) return;
  const auto maps = maps_of_row<A>(args, kBackwardScratchMaps, row_of(args.shape, row.sample, row.group));
  const A whole = save_slopes<F>(args, maps, row.group, scale, shift, centred);
  const int64_t rows = args.shape.over_batch ? 1 : args.shape.batch;
  if (args.partials.dsigma != nullptr)
    device::store(static_cast<A*>(args.partials.dsigma) + row.group * rows + row.sample, whole);
}

template <Form F, class A>
__device__ A backward_merge(const Arguments& args, const Item& item) {
  const Shape& shape = args.shape;
  const StatisticsItem at(args, item);
  const auto maps = maps_of_row<A>(args, kBackwardScratchMaps, at.group);
  A dsigma = 0;
  for (int p = at.position + device::thread(); p < at.position + at.positions; p += device::threads()) {
    A sums[kBackwardStatistics] = {};
    for (int unit = 0; unit < args.staged.units; ++unit) {
      const Samples samples(shape, args.staged, item.chunk, unit, args.staged.unit_samples);
      if (samples.begin >= samples.end) continue;
      for (int k = 0; k < kBackwardStatistics; ++k)
        sums[k] += device::load(merged_at<A>(args, k, kBackwardStatistics, unit, at.group, p));
    }
    dsigma += start_backward<F>(shape, maps, p, sums[0], sums[1], sums[2]);
  }
  return dsigma;
}

}  // namespace divnorm::cuda
