#include "pipeline_plan.h"

#include <algorithm>
#include <numeric>

#include "layout.h"

namespace divnorm::cuda {
namespace {

constexpr int kWarpThreads = 32;
constexpr int kBarrierBytes = 8;
constexpr int64_t kRowsTogether = 16;                     // of which chunks are multiples
constexpr int64_t kMostOfBoxed = (int64_t{1} << 31) - 1;  // rows of a tensor
constexpr int kAgainSlots = 4;                            // of the ring through which dy comes twice

bool aligned(int64_t bytes) { return bytes % kVectorBytes == 0; }

int64_t largest_divisor(int64_t number, int64_t most) {
  int64_t divisor = std::min(number, most);
  while (number % divisor != 0) --divisor;
  return divisor;
}

}  // namespace

PipelinePlan::PipelinePlan(const Shape& shape, bool backward, int element, int sum, const Preferences& preferences)
    : shape_(shape), backward_(backward), element_(element), sum_(sum), p_(preferences) {}

std::vector<Strategy> PipelinePlan::strategies(int blocks, int limit, bool twice) const {
  std::vector<Strategy> all;
  if (twice && (!backward_ || !shape_.statistics)) return all;
  if (shape_.absolute && !backward_) return all;  // it goes through a sample once more, when its mean is known
  const int64_t most = shape_.channels_last ? 1 : blocks;
  for (int64_t slices = 1; slices <= most; slices *= 2) {
    const int64_t stretch = shape_.positions * slices / blocks * element_;
    if (!shape_.channels_last && slices < blocks && stretch < p_.stretch_bytes) continue;
    if (auto found = strategy(blocks, slices, limit, twice)) all.push_back(*found);
  }
  return all;
}

std::optional<Strategy> PipelinePlan::strategy(int blocks, int64_t by_channels, int limit, bool twice) const {
  // Rows, channels or positions, that are a multiple of sixteen bytes where they lie one behind the other.
  const int64_t row = (shape_.channels_last ? shape_.group_channels : shape_.positions) * element_;
  const int64_t unit = kVectorBytes / std::gcd<int64_t>(row, kVectorBytes);
  Strategy chosen;
  chosen.method = Method::pipelined;
  chosen.arguments.shape = shape_;
  Resident& r = chosen.arguments.resident;
  if (!split(r, blocks, by_channels, unit) || !cut(chosen, unit, twice)) return std::nullopt;
  chosen.blocks = chosen.cluster = r.blocks;
  chosen.threads = chosen.arguments.pipeline.compute_threads + kMapThreads + kCopyThreads;
  box(chosen);
  surround(chosen);
  if (!lay_out(chosen, limit)) return std::nullopt;
  return chosen;
}

bool PipelinePlan::split(Resident& r, int blocks, int64_t by_channels, int64_t unit) const {
  const int64_t n = shape_.group_channels, positions = shape_.positions;
  int64_t tile_channels = ceil_div(n, by_channels), tile_positions = ceil_div(positions, blocks / by_channels);
  if (shape_.channels_last) {
    const bool joined = shape_.groups == 1;
    if (!aligned(joined ? positions * n * element_ : n * element_)) return false;
    if (joined) tile_positions = round_up(tile_positions, unit);
  } else {
    if (!aligned(n * positions * element_)) return false;
    tile_positions = aligned_positions(shape_, tile_positions, element_);
    if (tile_positions < positions && unit > 1) return false;
    tile_channels = round_up(tile_channels, unit);
  }
  r.tile_channels = static_cast<int>(std::min(tile_channels, n));
  r.tile_positions = static_cast<int>(std::min(tile_positions, positions));
  r.channel_blocks = static_cast<int>(ceil_div(n, r.tile_channels));
  r.position_blocks = static_cast<int>(ceil_div(positions, r.tile_positions));
  r.blocks = r.channel_blocks * r.position_blocks;
  return true;
}

bool PipelinePlan::cut(Strategy& chosen, int64_t unit, bool twice) const {
  Resident& r = chosen.arguments.resident;
  Pipeline& p = chosen.arguments.pipeline;
  p.tensors = (backward_ && !twice ? 2 : 1) + (shape_.residual ? 1 : 0);
  p.again_slots = twice ? kAgainSlots : 0;
  p.compute_threads = std::min(p_.threads, kComputeThreads) / kWarpThreads * kWarpThreads;
  if (p.compute_threads < 1) return false;
  const int64_t elements = p_.pipeline / p.tensors / element_;
  // Rows of a chunk, about as many as the table wants: a multiple of what every block's share is a multiple of, so that
  // every chunk is boxes of many rows.
  const auto of = [&](int64_t row, int64_t rows, int64_t all, bool joined) {
    const int64_t most = std::clamp<int64_t>(elements / row, 1, kRowsTogether);
    const int64_t step = joined ? unit : largest_divisor(std::gcd(rows, all), most);
    return std::min(std::max<int64_t>((elements / row + step / 2) / step, 1) * step, rows);
  };
  p.chunk_channels = r.tile_channels;
  p.chunk_positions = r.tile_positions;
  if (shape_.channels_last) {
    p.chunk_positions =
        static_cast<int>(of(shape_.group_channels, r.tile_positions, shape_.positions, shape_.groups == 1));
  } else {
    p.chunk_channels =
        static_cast<int>(of(r.tile_positions, r.tile_channels, shape_.group_channels, r.position_blocks == 1));
    if (!share_planes(r, p)) return false;
  }
  p.chunks = static_cast<int>(shape_.channels_last ? ceil_div(r.tile_positions, p.chunk_positions)
                                                   : ceil_div(r.tile_channels, p.chunk_channels));
  p.chunk_bytes = static_cast<int>(round_up(int64_t{p.chunk_channels} * p.chunk_positions * element_, kBoxAlignment));
  return true;
}

// How the computing threads share contiguous channels: each keeps to its positions from chunk to chunk.
bool PipelinePlan::share_planes(Resident& r, Pipeline& p) const {
  const int64_t positions = r.tile_positions, last = shape_.positions - (r.position_blocks - 1) * positions;
  const int64_t most = std::max(1, (backward_ ? kColumnBytes : kVectorBytes) / element_);
  const int64_t common = std::gcd(std::gcd(positions, last), most), period = most / common;
  // Channels side by side hold whole periods where there is one slice of the positions: they are whole sixteen bytes.
  // Half as many numbers together that are all of one channel take less than such that are of two.
  const bool crosses = period > 2 && r.position_blocks == 1 && positions >= most;
  p.vector = static_cast<int>(crosses ? most : period > 2 ? 1 : common);
  p.period = crosses ? log2_up(period) : 0;
  const int64_t slices = p.compute_threads / ceil_div(positions << p.period, p.vector);
  if (slices < 1) return false;
  r.slices.count = static_cast<int>(std::min<int64_t>(slices, p.chunk_channels >> p.period));
  r.slices.by_count = divider(r.slices.count);
  return true;
}

// Boxes for chunks whose rows are apart, where there are any that fill all of them.
void PipelinePlan::box(Strategy& chosen) const {
  const Resident& r = chosen.arguments.resident;
  Pipeline& p = chosen.arguments.pipeline;
  const int64_t n = shape_.group_channels, positions = shape_.positions;
  if (shape_.channels_last) {
    if (shape_.groups == 1 || shape_.batch * positions > kMostOfBoxed) return;
    const int64_t rows = std::gcd(std::gcd(p.chunk_positions, r.tile_positions), positions);
    p.boxes[0] = boxes(n, rows, p.chunk_positions);
    return;
  }
  if (r.position_blocks == 1 || shape_.batch * shape_.channels > kMostOfBoxed) return;
  const int64_t rows = std::gcd(std::gcd(p.chunk_channels, r.tile_channels), n);
  p.boxes[0] = boxes(r.tile_positions, rows, p.chunk_channels);
  const int64_t last = positions - int64_t{r.position_blocks - 1} * r.tile_positions;
  if (last == r.tile_positions) return;
  p.boxes[1] = boxes(last, rows, p.chunk_channels);
  if (p.boxes[1].rows == 0) p.boxes[0] = {};
}

// Of rows of so many numbers. rows: of which every chunk has a multiple; chunk: the most that one has.
Boxes PipelinePlan::boxes(int64_t row, int64_t rows, int64_t chunk) const {
  const int64_t row_bytes = row * element_;
  const int64_t together = largest_divisor(rows, kMostOfBox);
  if (together == 1 || row_bytes > kMostOfBox * kBoxWord) return {};  // a copy for each row is as good
  if (chunk > together && together * row_bytes % kBoxAlignment != 0) return {};
  return {static_cast<int>(together), static_cast<int>(row_bytes)};
}

// What lies around a block's own positions, and how its warps for the maps sum there.
void PipelinePlan::surround(Strategy& chosen) const {
  Shape& shape = chosen.arguments.shape;
  const Resident& r = chosen.arguments.resident;
  Pipeline& p = chosen.arguments.pipeline;
  int64_t low = 0, high = 0;
  for (int i = 0; i < shape.pass_count; ++i) {
    low += int64_t{shape.passes[i].lo} * shape.passes[i].inner;
    high += int64_t{shape.passes[i].hi} * shape.passes[i].inner;
  }
  p.reach = as_int(std::max(low, high));
  const int64_t around = std::min<int64_t>(shape.positions, r.tile_positions + 2 * int64_t{p.reach});
  choose_kinds(shape, around, kMapThreads, 1, p_.window_rounds);
  p.everywhere = !shape.whole && around == shape.positions;
  for (int i = 0; i < shape.pass_count; ++i)
    p.everywhere = p.everywhere || shape.passes[i].kind == PassKind::lines || shape.passes[i].kind == PassKind::blocks;
  p.own_pitch = static_cast<int>(pitch_of(r.tile_positions));
  p.margin = static_cast<int>(p.everywhere || shape.whole ? 0 : pitch_of(p.reach));
  p.pitch = static_cast<int>(pitch_of(shape.whole    ? 0
                                      : p.everywhere ? shape.positions
                                                     : p.margin + r.tile_positions + p.reach));
  const int64_t statistics = backward_ ? kBackwardStatistics : kForwardStatistics;
  p.received = as_int(r.channel_blocks * statistics * p.pitch);
  // Passes work on one map, or on two where one of them leaves something else than a result in its place.
  p.working = p.pitch;
  for (const Pass& pass : shape.passes)
    if (pass.target > statistics && (pass.kind == PassKind::blocks || !pass.last)) p.working = 2 * p.pitch;
}

bool PipelinePlan::lay_out(Strategy& chosen, int limit) const {
  const Resident& r = chosen.arguments.resident;
  Pipeline& p = chosen.arguments.pipeline;
  SharedLayout& at = chosen.arguments.shared;
  SharedPlan plan;
  const int64_t statistics = backward_ ? kBackwardStatistics : kForwardStatistics;
  const int64_t partial = statistics * (r.slices.count << p.period) * p.own_pitch;
  // Those of a chunk of pixels are written while the maps of the sample before are made.
  p.partial_step = shape_.channels_last ? static_cast<int>(partial) : 0;
  at.partial = plan.add((partial + p.partial_step) * sum_);
  p.maps = plan.add((2 * int64_t{p.received} + p.working) * sum_);
  p.results = plan.add(2 * int64_t{kResults} * p.own_pitch * sum_);
  p.saved = backward_ ? plan.add(kSavedSamples * int64_t{kSavedMaps} * p.own_pitch * sum_) : -1;
  p.totals = shape_.whole ? plan.add(2 * int64_t{r.blocks} * kTotals * sum_) : -1;
  const int64_t warps = p.compute_threads / kWarpThreads;
  const int64_t affine = shape_.per_position ? r.tile_positions : r.tile_channels;
  const int64_t sharing = std::max<int64_t>(1, warps / ceil_div(p.chunk_channels, kChannelsTogether));
  add_parameters(plan, at, shape_, backward_, affine,
                 shape_.per_position || shape_.channels_last ? affine : sharing * affine, sum_);
  at.reduction = plan.add(chosen.threads / kWarpThreads * sum_);
  at.x = at.dy = at.residual = at.local = at.owned = at.totals = -1;
  at.pitch = p.own_pitch;
  const int64_t slot = int64_t{p.tensors} * p.chunk_bytes;
  if (p.again_slots > 0) p.again = plan.add(int64_t{p.again_slots} * p.chunk_bytes, kBoxAlignment);
  const int64_t barriers_beside = 2 * p.again_slots + kSignals;
  const int64_t room = limit - plan.bytes() - barriers_beside * kBarrierBytes - kVectorBytes - kBoxAlignment;
  p.slots = static_cast<int>(std::min(room / (slot + 2 * kBarrierBytes), 2 * int64_t{p.chunks}));
  if (p.slots <= p.chunks) return false;
  p.ahead = (p.slots - p.chunks) / 2;  // the other half is on its way meanwhile
  p.barriers = plan.add((2 * p.slots + barriers_beside) * kBarrierBytes);
  // Where the chunks were, the gradients of pixels' parameters that threads have kept are added up, and partial sums.
  const int64_t kept =
      int64_t{p.compute_threads} * std::max(1, kColumnBytes / element_) * (learns_thresholds(shape_) ? 3 : 2) * sum_;
  const int64_t behind = std::max<int64_t>(backward_ && shape_.channels_last ? kept : 0,
                                           p_.finish_inside > 0 ? chosen.threads * kVectorBytes : 0);
  p.ring = plan.add(std::max(p.slots * slot, behind), kBoxAlignment);
  at.bytes = plan.bytes();
  return at.bytes <= limit;
}

}  // namespace divnorm::cuda
