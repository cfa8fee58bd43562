#include "shape.h"

namespace divnorm::cuda {
namespace {

Window window_of(const Field& field) {
  Window window;
  window.present = field.present;
  for (int a = 0; a < kAxes; ++a) {
    window.lo[a] = static_cast<int>(field.lo[a]);
    window.hi[a] = static_cast<int>(field.hi[a]);
    window.counted[a] = field.divisor[a] == 0;
    if (!window.counted[a]) window.divisor *= static_cast<double>(field.divisor[a]);
  }
  return window;
}

// Sums over a field: one pass for each axis whose window is more than one position. The last writes to `result`, those
// before it to `result` and `spare` in turns.
void add_passes(Shape& shape, const Window& window, bool of_suppression, bool mirrored, int source, int result,
                int spare) {
  if (!window.present) return;
  Pass passes[kAxes];
  int count = 0;
  for (int a = 0; a < kAxes; ++a) {
    if (window.lo[a] == 0 && window.hi[a] == 0) continue;
    Pass& pass = passes[count++];
    pass.lo = mirrored ? window.hi[a] : window.lo[a];
    pass.hi = mirrored ? window.lo[a] : window.hi[a];
    pass.extent = shape.extent[a];
    for (int inside = a + 1; inside < kAxes; ++inside) pass.inner *= shape.extent[inside];
    pass.lines = shape.positions / pass.extent;
    pass.blocks = static_cast<int>(ceil_div(pass.extent, int64_t{pass.lo} + pass.hi + 1));
    pass.by_extent = divider(pass.extent);
    pass.by_inner = divider(pass.inner);
    pass.by_blocks = divider(pass.blocks);
    const bool covers = pass.lo >= pass.extent - 1 && pass.hi >= pass.extent - 1;
    pass.kind = covers ? PassKind::lines : PassKind::blocks;
  }
  if (count == 0) count = 1;
  for (int i = 0; i < count; ++i) {
    Pass& pass = passes[i];
    pass.of_suppression = of_suppression;
    pass.last = i == count - 1;
    pass.source = source;
    pass.target = (count - 1 - i) % 2 == 0 ? result : spare;
    source = pass.target;
    shape.passes[shape.pass_count++] = pass;
  }
}

}  // namespace

int log2_up(int64_t number) {
  int shift = 0;
  while (int64_t{1} << shift < number) ++shift;
  return shift;
}

Divider divider(int64_t divisor) {
  const int shift = log2_up(divisor);
  return {static_cast<uint32_t>(((int64_t{1} << (31 + shift)) + divisor - 1) / divisor), shift};
}

Shape shape_of(const Problem& problem, Direction direction) {
  Shape shape;
  shape.batch = problem.batch;
  shape.channels = problem.channels;
  shape.groups = static_cast<int>(problem.groups);
  shape.group_channels = static_cast<int>(problem.group_channels());
  shape.positions = static_cast<int>(problem.positions());
  for (int a = 0; a < kAxes; ++a) {
    shape.extent[a] = static_cast<int>(problem.extent[a]);
    shape.by_extent[a] = divider(problem.extent[a]);
  }
  shape.over_batch = problem.over_batch;
  shape.per_position = problem.affine_per_position;
  shape.channels_last = problem.channels_last;
  shape.activation = problem.activation;
  shape.residual = problem.residual;
  shape.absolute = problem.p == 1 && problem.suppression.present;
  shape.keeps_mean = problem.keeps_mean();
  const bool clamped = problem.activation == Activation::none || problem.activation == Activation::relu;
  if (!clamped || shape.residual || shape.absolute || shape.keeps_mean) shape.form = Form::general;
  shape.summation = window_of(problem.summation);
  shape.suppression = window_of(problem.suppression);
  shape.statistics = shape.summation.present || shape.suppression.present;
  shape.whole = problem.whole && shape.statistics;
  shape.map_positions = problem.whole ? 1 : shape.positions;
  if (shape.suppression.present) shape.slope_of = shape.whole ? SlopeOf::normals : SlopeOf::values;
  if (shape.absolute) shape.slope_of = SlopeOf::signs;
  if (shape.whole) return shape;
  if (direction == Direction::forward) {
    using namespace forward_map;
    add_passes(shape, shape.summation, false, false, mean_of_channels, mean, spare);
    shape.mean_passes = shape.pass_count;
    add_passes(shape, shape.suppression, true, false, squares, rstd, spare);
  } else {
    using namespace backward_map;
    add_passes(shape, shape.suppression, true, true, scale, slope, spare);
    add_passes(shape, shape.summation, false, true, shift, offset, spare);
  }
  return shape;
}

void choose_kinds(Shape& shape, int64_t positions, int64_t threads, int64_t blocks, int64_t window_rounds) {
  for (int i = 0; i < shape.pass_count; ++i) {
    Pass& pass = shape.passes[i];
    if (pass.kind != PassKind::blocks) continue;
    const int64_t by_blocks = ceil_div(int64_t{pass.lines} * pass.blocks, blocks * threads);
    if (ceil_div(positions, threads) <= window_rounds * by_blocks) pass.kind = PassKind::windows;
  }
}

}  // namespace divnorm::cuda
