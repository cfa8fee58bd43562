#include "strategy.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <vector>

#include "layout.h"
#include "pipeline_plan.h"
#include "sums.h"

namespace divnorm::cuda {
namespace {

constexpr int kWarpThreads = 32;
constexpr int kMostBlocks = 32;
constexpr int kBlockOverhead = 1024;  // of shared memory, what the driver keeps of every block
constexpr int kApplySets = 3;         // of neighbouring channels, that a warp goes through in backward's last stage
constexpr double kFull = 0.9;         // of the blocks that the table wants at once: a device that has these is full

int64_t power_of_two_below(int64_t number) { return int64_t{1} << (log2_up(number + 1) - 1); }

class Chooser {
 public:
  Chooser(const Problem& problem, Direction direction, Part part, const Preferences& preferences, const Device& device)
      : p_(preferences),
        device_(device),
        backward_(direction == Direction::backward),
        part_(part),
        row_sums_(backward_ && part == Part::first),
        element_(static_cast<int>(bytes_of(problem.dtype))),
        sum_(static_cast<int>(bytes_of(problem.compute()))),
        shape_(shape_of(problem, direction)),
        partial_sums_(shape_, direction, sum_) {
    if (row_sums_) shape_.form = Form::general;  // there is one kernel for both
  }

  Strategy choose(const ClustersAtOnce& at_once) const {
    if (shape_.over_batch || part_ != Part::both) return staged();
    if (p_.pipeline > 0 && device_.clusters) {
      const PipelinePlan plan(shape_, backward_, element_, sum_, p_);
      const int limit = device_.block_shared_bytes;
      for (const bool twice : {false, true}) {
        const auto found =
            fullest(1, limit, at_once, [&](int blocks) { return plan.strategies(blocks, limit, twice); });
        if (found) return *found;
      }
    }
    // As many blocks to a multiprocessor as the table wants; where a row is too large for that, a whole one.
    for (const int most : {device_.shared_bytes / p_.blocks - kBlockOverhead, device_.block_shared_bytes}) {
      const int limit = std::min(most, device_.block_shared_bytes);
      const auto found = fullest(p_.blocks, limit, at_once, [&](int blocks) { return residents(blocks, limit); });
      if (found) return *found;
    }
    return staged();
  }

 private:
  // Of the clusters whose blocks keep within the limit of shared memory, the smallest that fills the device with
  // `wanted` blocks to a multiprocessor; where none does, the one of most blocks. strategies(blocks): of clusters of at
  // most so many, the first that fits is taken.
  template <class Strategies>
  std::optional<Strategy> fullest(int wanted, int limit, const ClustersAtOnce& at_once, Strategies&& strategies) const {
    const int most = device_.clusters ? p_.cluster : std::min(p_.cluster, 1);
    std::optional<Strategy> best;
    for (int blocks = 1; blocks <= most; blocks *= 2)
      for (Strategy& tried : strategies(blocks)) {
        if (tried.cluster > most || tried.arguments.shared.bytes > limit) continue;
        int64_t clusters = clusters_with_room(tried);
        if (at_once) clusters = std::min(clusters, at_once(tried));
        if (clusters < 1) continue;
        share_out(tried, clusters);
        if (best && tried.blocks <= best->blocks) break;
        best = tried;
        if (static_cast<double>(tried.blocks) >= kFull * device_.multiprocessors * wanted) return best;
        break;
      }
    return best;
  }

  // From the most slices of the channels to the fewest.
  std::vector<Strategy> residents(int blocks, int limit) const {
    std::vector<Strategy> all;
    const int64_t most = channel_slices(blocks);
    for (int64_t slices = most; slices >= 1; slices /= 2) {
      if (slices < most && stretch(slices, blocks) < p_.stretch_bytes) break;
      all.push_back(resident(blocks, slices, limit));
    }
    return all;
  }

  int statistics() const { return backward_ ? kBackwardStatistics : kForwardStatistics; }
  int64_t rows() const { return (shape_.over_batch ? 1 : shape_.batch) * shape_.groups; }

  // Shared memory for tiles of these sizes; owned: numbers of it.
  SharedLayout layout(int64_t channels, int64_t positions, int64_t slices, int64_t owned, int64_t threads) const {
    const int64_t pitch = pitch_of(positions), warps = threads / kWarpThreads;
    const int64_t tile = channels * positions * element_, affine = shape_.per_position ? positions : channels;
    const int64_t in_sums =
        threads * (kColumnBytes / std::min(element_, kColumnBytes)) * (learns_thresholds(shape_) ? 3 : 2) * sum_;
    const int64_t gradients =
        shape_.per_position || shape_.channels_last ? affine : std::max(channels, kChannelsTogether * warps);
    SharedPlan plan;
    SharedLayout at;
    at.x = plan.add(tile);
    at.dy = backward_ ? plan.add(shape_.channels_last ? std::max(tile, in_sums) : tile) : -1;
    at.residual = shape_.residual ? plan.add(tile) : -1;
    const int64_t local = 2 * pitch * sum_, partial = statistics() * slices * pitch * sum_;
    at.partial = plan.add(partial);
    // Forward has used the statistics by then, which are as many, but where those of |v| follow the mean.
    at.local = backward_ || shape_.absolute ? plan.add(local) : at.partial;
    at.owned = plan.add(owned * sum_);
    add_parameters(plan, at, shape_, backward_, affine, gradients, sum_);
    at.reduction = plan.add(warps * sum_);
    at.totals = shape_.whole ? plan.add(kTotals * sum_) : -1;
    at.pitch = static_cast<int>(pitch);
    at.bytes = plan.bytes();
    return at;
  }

  // Slices of the channels, so many that every thread of the statistics has positions to sum.
  int64_t slices(int64_t channels, int64_t positions, int threads) const {
    if (shape_.channels_last) return 1;
    int64_t vector = std::max(1, kColumnBytes / element_);  // as with_vectors() chooses it
    while (positions % vector != 0) vector /= 2;
    return std::clamp<int64_t>(threads / (positions / vector), 1, channels);
  }

  // Bytes of a contiguous channel that a block holds.
  int64_t stretch(int64_t by_channels, int blocks) const { return shape_.positions * by_channels / blocks * element_; }

  // Slices of the channels that a row is split into, the rest of the split being by positions: contiguous by channels
  // while there are enough of them; channels_last by positions, whose channels lie side by side.
  int64_t channel_slices(int blocks) const {
    const int64_t n = shape_.group_channels;
    if (shape_.channels_last) return blocks / power_of_two_below(std::min<int64_t>(blocks, shape_.positions));
    int64_t slices = 1;
    while (slices < blocks && n / (2 * slices) >= p_.slice_channels) slices *= 2;
    while (slices < blocks && 2 * slices <= n && stretch(slices, blocks) < p_.stretch_bytes) slices *= 2;
    return slices;
  }

  // A cluster of at most `blocks` blocks, without its share of the samples; with fewer slices than threads could use
  // where they would take the shared memory over the limit.
  Strategy resident(int blocks, int64_t by_channels, int limit) const {
    Strategy chosen;
    chosen.method = Method::resident;
    chosen.arguments.shape = shape_;
    Resident& r = chosen.arguments.resident;
    const int64_t n = shape_.group_channels, positions = shape_.positions;
    r.tile_channels = static_cast<int>(ceil_div(n, by_channels));
    r.tile_positions = static_cast<int>(aligned_positions(shape_, ceil_div(positions, blocks / by_channels), element_));
    r.channel_blocks = static_cast<int>(ceil_div(n, r.tile_channels));
    r.position_blocks = static_cast<int>(ceil_div(positions, r.tile_positions));
    r.blocks = r.channel_blocks * r.position_blocks;
    r.owned = static_cast<int>(ceil_div(positions, r.blocks));
    r.by_owned = divider(r.owned);
    const int64_t tile = int64_t{r.tile_channels} * r.tile_positions * element_;
    chosen.blocks = chosen.cluster = r.blocks;
    chosen.threads = static_cast<int>(
        std::clamp<int64_t>(round_up(ceil_div(tile, p_.bytes_per_thread), kWarpThreads), kWarpThreads, p_.threads));
    choose_kinds(chosen.arguments.shape, r.owned, chosen.threads, r.blocks, p_.window_rounds);
    const int64_t maps = kSavedMaps + (backward_ ? kBackwardScratchMaps : kForwardScratchMaps);
    SharedLayout& shared = chosen.arguments.shared;
    int64_t count = slices(r.tile_channels, r.tile_positions, chosen.threads) + 1;
    do {
      --count;
      shared = layout(r.tile_channels, r.tile_positions, count, maps * r.owned, chosen.threads);
    } while (shared.bytes > limit && count > 1);
    r.slices = {static_cast<int>(count), divider(count)};
    if (p_.finish_inside > 0) shared.bytes = std::max(shared.bytes, chosen.threads * kVectorBytes);
    return chosen;
  }

  // Clusters that the multiprocessors together have memory and registers for.
  int64_t clusters_with_room(const Strategy& strategy) const {
    const int64_t by_memory = device_.shared_bytes / (int64_t{strategy.arguments.shared.bytes} + kBlockOverhead);
    const int64_t by_registers = strategy.method == Method::pipelined
                                     ? 1
                                     : blocks_for(kResidentBlocks, element_) * kResidentThreads / strategy.threads;
    const int64_t blocks = std::clamp<int64_t>(std::min(by_memory, by_registers), 1, kMostBlocks);
    return std::max<int64_t>(1, device_.multiprocessors * blocks / strategy.cluster);
  }

  // As many clusters as run at once; each takes the same number of samples of a group, give or take one.
  void share_out(Strategy& chosen, int64_t clusters) const {
    Resident& r = chosen.arguments.resident;
    const int64_t of_group = std::clamp<int64_t>(clusters / shape_.groups, 1, shape_.batch);
    const int64_t rounds = ceil_div(shape_.batch, of_group);
    r.parts = static_cast<int>(ceil_div(shape_.batch, rounds));
    chosen.blocks = int64_t{shape_.groups} * r.parts * r.blocks;

    Scratch& scratch = chosen.scratch;
    scratch.affine_slots = r.parts;
    scratch.sigma_slots = int64_t{r.parts} * r.blocks;
    scratch.l1_slots = chosen.blocks;
    chosen.summing_blocks = partial_sums_.summing_blocks(p_.finish_inside, chosen, clusters);
    const bool by_positions = r.position_blocks > 1 && !shape_.per_position;
    r.merges_gradients = by_positions && chosen.summing_blocks > 0;
    if (by_positions && !r.merges_gradients) scratch.affine_slots *= r.position_blocks;
    ScratchPlan plan;
    end_scratch(plan, chosen);
  }

  Strategy staged() const {
    const bool with_statistics = shape_.statistics && part_ != Part::second && !row_sums_;
    const bool with_results = part_ != Part::first || row_sums_;
    Strategy chosen;
    chosen.arguments.shape = shape_;
    Staged& s = chosen.arguments.staged;
    chosen.threads = p_.staged_threads;
    const int64_t n = shape_.group_channels, positions = shape_.positions;
    const int64_t residual = shape_.residual ? 1 : 0, read_twice = backward_ ? 2 + residual : 1;
    const int64_t elements = p_.tile_bytes / element_ / (backward_ ? read_twice : 1 + residual);
    const int64_t shortest = shape_.channels_last ? 1 : p_.stretch_bytes / element_;
    const int64_t tile_positions = std::clamp<int64_t>(elements / n, std::min<int64_t>(shortest, positions),
                                                       std::min<int64_t>(p_.tile_positions, positions));
    s.tile_positions = static_cast<int>(aligned_positions(shape_, tile_positions, element_));
    s.tile_channels = static_cast<int>(std::clamp<int64_t>(elements / s.tile_positions, 1, n));
    const int64_t slice_count = slices(s.tile_channels, s.tile_positions, chosen.threads);
    s.slices = {static_cast<int>(slice_count), divider(slice_count)};
    shape_apply(s, elements, chosen.threads);
    const int64_t tiles = ceil_div(positions, s.tile_positions);
    const int64_t apply_tiles = ceil_div(positions, s.apply_positions), channel_tiles = ceil_div(n, s.apply_channels);
    const int64_t wanted_items = int64_t{device_.multiprocessors} * p_.items;

    const int64_t sample_bytes = shape_.channels * positions * element_ * read_twice;
    const auto cached = static_cast<int64_t>(p_.cache_share * static_cast<double>(device_.cache_bytes));
    const bool chunked = with_statistics && with_results && !shape_.over_batch;
    const int64_t most_samples = chunked ? std::max<int64_t>(1, cached / sample_bytes) : shape_.batch;
    s.chunks = static_cast<int>(ceil_div(shape_.batch, most_samples));
    s.chunk_samples = ceil_div(shape_.batch, s.chunks);
    s.chunks = static_cast<int>(ceil_div(shape_.batch, s.chunk_samples));

    const int64_t units = shape_.over_batch
                              ? std::clamp<int64_t>(wanted_items / (tiles * shape_.groups), 1, shape_.batch)
                              : s.chunk_samples;
    s.unit_samples = ceil_div(s.chunk_samples, units);
    s.units = static_cast<int>(ceil_div(s.chunk_samples, s.unit_samples));
    // The gradients' partial sums have a slot for each span: no more of them than there is work to share out.
    const int64_t spans =
        std::clamp<int64_t>(wanted_items / (apply_tiles * channel_tiles * shape_.groups), 1, s.chunk_samples);
    s.span_samples = ceil_div(s.chunk_samples, spans);
    s.spans = static_cast<int>(ceil_div(s.chunk_samples, s.span_samples));

    const int64_t rows_of_chunk = shape_.over_batch ? shape_.groups : s.chunk_samples * shape_.groups;
    s.row_items = positions <= p_.row_positions
                      ? 1
                      : static_cast<int>(ceil_div(positions, std::max(p_.row_positions / 4, chosen.threads)));
    s.map_rows = rows();
    choose_kinds(chosen.arguments.shape, ceil_div(positions, s.row_items), chosen.threads, s.row_items,
                 p_.window_rounds);
    int64_t all_items = 0;
    const auto add = [&](StageKind kind, int64_t items, int first_pass = 0, int end_pass = 0) {
      s.stage[s.stages++] = {kind, static_cast<int>(items), 0, first_pass, end_pass};
      all_items += items;
    };
    const auto add_sweep = [&](StageKind sweep, StageKind merge, int first_pass, int end_pass) {
      add(sweep, s.units * shape_.groups * tiles);
      if (shape_.whole || shape_.over_batch) add(merge, shape_.whole ? rows_of_chunk : shape_.groups * tiles);
      if (s.row_items == 1 && !shape_.whole)
        add(StageKind::passes, rows_of_chunk, first_pass, end_pass);
      else
        for (int i = first_pass; i < end_pass; ++i) add(StageKind::passes, rows_of_chunk * s.row_items, i, i + 1);
    };
    // Forward with p = 1 reads x once more when it knows the mean, where there is one.
    const bool deviations = shape_.absolute && !backward_;
    if (with_statistics && (!deviations || shape_.summation.present))
      add_sweep(StageKind::statistics, StageKind::merge, 0, deviations ? shape_.mean_passes : shape_.pass_count);
    if (deviations)
      add_sweep(StageKind::deviations, StageKind::merge_deviations, shape_.mean_passes, shape_.pass_count);
    if (with_results) add(StageKind::apply, s.spans * shape_.groups * channel_tiles * apply_tiles);
    // Steps of as many items as are at work at once lie before and after the passes: who waits there finds it done.
    const int64_t at_work = int64_t{device_.multiprocessors} * blocks_for(kStagedBlocks, element_);
    const auto apart = static_cast<int>(std::min<int64_t>(ceil_div(at_work, all_items), s.chunks));
    for (int i = 1; i < s.stages && s.chunks > 1; ++i) {
      const bool among_passes = s.stage[i].kind == StageKind::passes && s.stage[i - 1].kind == StageKind::passes;
      s.stage[i].lag = s.stage[i - 1].lag + (among_passes ? 1 : apart);
    }
    const int steps = s.chunks + s.stage[s.stages - 1].lag;
    chosen.blocks = all_items * steps;
    s.items = as_int(all_items);

    const int64_t pitch = pitch_of(s.tile_positions);
    chosen.arguments.shared =
        layout(s.tile_channels, s.tile_positions, s.slices.count, statistics() * pitch, chosen.threads);
    const int64_t row_sums = row_sums_ ? kTotals * chosen.threads / kWarpThreads : 0;
    s.apply_shared = layout(s.apply_channels, s.apply_positions, 1, row_sums, chosen.threads);
    chosen.arguments.shared.bytes = std::max(chosen.arguments.shared.bytes, s.apply_shared.bytes);

    Scratch& scratch = chosen.scratch;
    ScratchPlan plan;
    if (!row_sums_) {  // whose blocks take no tickets
      scratch.counter_count = 1 + int64_t{s.stages} * s.chunks;
      scratch.counters = plan.add(scratch.counter_count * static_cast<int64_t>(sizeof(int)));
    }
    if (with_statistics)
      scratch.maps =
          plan.add((backward_ ? kBackwardScratchMaps : kForwardScratchMaps) * s.map_rows * shape_.map_positions * sum_);
    int64_t merged = 0;
    if (row_sums_) {
      scratch.row_parts = apply_tiles * channel_tiles * (shape_.over_batch ? s.spans : 1);
      merged = scratch.row_parts * kTotals * s.map_rows;
    } else if (with_statistics && (shape_.whole || shape_.over_batch)) {
      const int64_t sets = (shape_.over_batch ? int64_t{s.units} : shape_.batch) * shape_.groups;
      merged = sets * (shape_.whole ? kTotals * tiles : statistics() * positions);
    }
    if (merged > 0) scratch.merged = plan.add(merged * sum_);
    scratch.affine_slots = int64_t{s.chunks} * s.spans * (shape_.per_position ? 1 : apply_tiles);
    scratch.sigma_slots = (shape_.over_batch ? 1 : int64_t{s.chunks} * s.units) * tiles;
    if (shape_.whole) scratch.sigma_slots = shape_.over_batch ? 1 : shape_.batch;
    scratch.l1_slots = int64_t{s.chunks} * s.stage[s.stages - 1].items;
    end_scratch(plan, chosen);
    return chosen;
  }

  // The last stage's tiles. Backward adds up over the positions of one, and reads the maps for each set of channels: it
  // takes as many positions as leave every warp channels to go through, or channels_last a stretch of them.
  void shape_apply(Staged& s, int64_t elements, int threads) const {
    s.apply_positions = s.tile_positions;
    s.apply_channels = s.tile_channels;
    if (!backward_ || shape_.per_position) return;
    const int64_t least =
        shape_.channels_last ? p_.stretch_bytes / element_ : threads / kWarpThreads * kApplySets * kChannelsTogether;
    const int64_t channels = std::clamp<int64_t>(least, 1, s.tile_channels);
    s.apply_positions = static_cast<int>(
        aligned_positions(shape_, std::min<int64_t>(elements / channels, p_.tile_positions), element_));
    s.apply_channels = static_cast<int>(channels);
  }

  void end_scratch(ScratchPlan& plan, Strategy& chosen) const {
    // The parameters' gradients are of the part before.
    if (!backward_ || part_ != Part::second) partial_sums_.add_to(plan, chosen);
    chosen.scratch.bytes = plan.bytes();
  }

  Preferences p_;
  Device device_;
  bool backward_;
  Part part_;
  bool row_sums_;  // of whole fields, in one sweep that makes the parameters' gradients too (seam_sums.h)
  int element_, sum_;
  Shape shape_;
  PartialSums partial_sums_;
};

Strategy choose(const Problem& problem, Direction direction, Part part, const Preferences& preferences,
                const Device& device, const ClustersAtOnce& at_once) {
  if (problem.positions() >= kMostPositions || problem.channels >= kMostPositions || problem.batch >= kMostPositions)
    throw std::invalid_argument("the CUDA kernels take fewer than 2^30 samples, channels and positions");
  if (preferences.threads > kResidentThreads || preferences.staged_threads > kStagedThreads)
    throw std::invalid_argument("the table asks for more threads than the CUDA kernels are compiled for");
  const Strategy chosen = Chooser(problem, direction, part, preferences, device).choose(at_once);
  if (chosen.blocks > std::numeric_limits<int>::max()) throw std::invalid_argument("too many blocks for one launch");
  return chosen;
}

}  // namespace

Strategy choose(const Problem& problem, Direction direction, const Preferences& preferences, const Device& device,
                const ClustersAtOnce& at_once) {
  return choose(problem, direction, Part::both, preferences, device, at_once);
}

Strategy choose(const Problem& problem, Direction direction, Part part, const Preferences& preferences,
                const Device& device) {
  return choose(problem, direction, part, preferences, device, {});
}

}  // namespace divnorm::cuda
