// What a kernel is told: the call's shape, its fields and the passes that sum over them, its tensors, and how the work
// is cut. Computed once per geometry by shape.cpp and strategy.cpp; plain data, passed by value.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "boxes.h"

namespace divnorm::cuda {

// What the kernels are compiled for: the most threads of a block, and blocks of a multiprocessor that registers are
// left for (in double precision half of them).
constexpr int kResidentThreads = 256, kResidentBlocks = 2;
constexpr int kStagedThreads = 128, kStagedBlocks = 4;  // with five, backward spills
// Of the pipelined kernels, one block to a multiprocessor: warps that compute, that make the maps, and one that copies.
constexpr int kComputeThreads = 256, kMapThreads = 64, kCopyThreads = 32;
constexpr int kPipelinedThreads = kComputeThreads + kMapThreads + kCopyThreads;
constexpr int kSignals = 6;       // barriers of samples, behind two for every slot
constexpr int kSavedSamples = 4;  // whose mean and rstd backward keeps, as far as they are read ahead
constexpr int blocks_for(int blocks, int element_size) { return element_size == 8 ? (blocks + 1) / 2 : blocks; }

// plain: at most a ReLU behind the norm, p = 2, and v in the numerator; general: all that a problem can ask. Each
// kernel is compiled for both, so that the many calls of the first pay nothing for the second.
enum class Form { plain, general };

constexpr double kDeviationScale = deviation_scale(1);

constexpr int kVectorBytes = 16;  // the widest access
constexpr int kWordBytes = 4;     // of a bank of shared memory
// What a thread takes at once where it has much to keep of every number; in channels_last, what backward's sums take of
// dy's place.
constexpr int kColumnBytes = 8;
// Contiguous channels that a warp of the backward kernels goes through together: the maps are read once for them.
constexpr int kChannelsTogether = 2;

// Division of a number below 2^31 by one that is known before the launch: a multiplication and a shift (Granlund and
// Montgomery, "Division by Invariant Integers using Multiplication", 1994).
struct Divider {
  uint32_t multiplier = uint32_t{1} << 31;
  int shift = 0;
};

// Slices of a tile's channels: channel c is in slice c % count; or of their periods (plane_column.h).
struct Slices {
  int count = 1;
  Divider by_count;
};

// What the slope of backward multiplies: there is none without suppression; v; of whole fields v/s, for a slope of v
// goes with 1/s^2 and overflows before dx does; for p = 1 the sign of v.
enum class SlopeOf : int { nothing, values, normals, signs };

struct Window {
  bool present = false;
  int lo[kAxes] = {}, hi[kAxes] = {};
  bool counted[kAxes] = {};  // whether the average divides by the positions inside the image
  double divisor = 1;        // of the other axes
};

// How a pass sums: not at all where the field is a single position; whole lines where every window covers them; each
// window by itself; or by blocks as long as the window.
enum class PassKind : int { none, lines, windows, blocks };

// Sums of the map `source` over the window of one axis, into the map `target`. The last pass of a field ends it.
struct Pass {
  PassKind kind = PassKind::none;
  int lo = 0, hi = 0;
  int extent = 1, inner = 1, lines = 1;  // of the axis: lines of `extent` positions, `inner` of them side by side
  int blocks = 1;                        // of a line
  Divider by_extent, by_inner, by_blocks;
  int source = 0, target = 0;
  bool of_suppression = false, last = false;
};
constexpr int kMaxPasses = 2 * kAxes;

// Maps that a call works on, by number.
namespace forward_map {
enum { mean_of_channels, squares, spare, mean, rstd };
}
namespace backward_map {
enum { scale, shift, centred_sum, spare, slope, offset, mean, rstd };
}
// The statistics of a position: sums over channels that the maps start from.
constexpr int kForwardStatistics = 2, kBackwardStatistics = 3;
constexpr int kForwardScratchMaps = 3;   // mean and rstd are results
constexpr int kBackwardScratchMaps = 6;  // mean and rstd are inputs
constexpr int kSavedMaps = 2;
constexpr int kForwardMaps = kForwardScratchMaps + kSavedMaps;
constexpr int kBackwardMaps = kBackwardScratchMaps + kSavedMaps;
constexpr int kResults = 2;  // of the pipelined kernels' maps: mean and rstd, slope and offset
// What a block hands on of a row of whole fields: count, mean and sum of squares; for p = 1 the sum of |v|; sums over
// it of g v, of P1 rstd and of what the slope multiplies; or RowSums.
constexpr int kTotals = 3;

struct Shape {
  int64_t batch = 0, channels = 0;
  int groups = 1, group_channels = 1;
  int positions = 1;
  int map_positions = 1;  // one where the fields are whole
  int extent[kAxes] = {1, 1, 1};
  Divider by_extent[kAxes];
  bool over_batch = false;
  bool per_position = false;  // weight and bias have one element per position of the single channel
  bool channels_last = false;
  Form form = Form::plain;
  Activation activation = Activation::none;
  bool residual = false;    // one is added before the activation
  bool absolute = false;    // p = 1: deviations are averages of |v|
  bool keeps_mean = false;  // x stands in the numerator in place of v
  bool statistics = false;  // there is a field
  bool whole = false;       // every field covers all positions: nothing is summed over windows
  Window summation, suppression;
  SlopeOf slope_of = SlopeOf::nothing;
  Pass passes[kMaxPasses];
  int pass_count = 0;
  int mean_passes = 0;  // of forward, those that come first and lead to the mean
};

struct Tensors {
  const void* x = nullptr;
  const void* dy = nullptr;
  const void* residual = nullptr;
  void* out = nullptr;        // y or dx
  void* dresidual = nullptr;  // null: not wanted
  Parameter weight, bias, sigma, threshold;
  double sigma_value = 0;  // where there is no tensor
  void *mean = nullptr, *rstd = nullptr;
  void* variance = nullptr;   // of whole fields, to forward; null: not wanted
  const void* dl1 = nullptr;  // null: zero
  double l1_numbers = 1;      // that dl1 is shared out among: of an average of |v|
};

// Partial sums of the parameters' gradients and of l1, one row per slot; null: not wanted.
struct Partials {
  void *dweight = nullptr, *dbias = nullptr, *dthreshold = nullptr, *dsigma = nullptr, *l1 = nullptr;
  int* counters = nullptr;  // what the sums over them count with: set to zero for them
  int counter_count = 0;
};

// A cluster of blocks holds a row (a group of a sample): rank r the channels of slice r % channel_blocks and the
// positions of slice r / channel_blocks. It works on samples part, part + parts, ...
struct Resident {
  int channel_blocks = 1, position_blocks = 1, blocks = 1;  // the third is the product
  int tile_channels = 1, tile_positions = 1;
  Slices slices;  // a block keeps the statistics of each
  int owned = 1;  // positions of the maps that each block keeps for its cluster, one block after the other
  Divider by_owned;
  int parts = 1;
  bool merges_gradients = false;  // of the parameters: those of blocks with the same channels are one slot
};

// The same of a cluster whose blocks pass their shares on in chunks, through a ring of slots (pipeline.h). What lies
// where is in bytes from the start of shared memory, sizes of maps in numbers.
struct Pipeline {
  int compute_threads = 0;
  int chunk_channels = 1, chunk_positions = 1;
  int chunks = 1, slots = 1;         // of a sample, at most, and of the ring
  int vector = 1, period = 0;        // numbers that a thread takes together, and log2 of a period's channels
  int ahead = 0;                     // of the next sample, before the results of one
  int tensors = 1, chunk_bytes = 0;  // a slot has a chunk of each tensor
  Boxes boxes[2];           // of a chunk; the second ones of the last slice of the positions, where that is shorter
  int again_slots = 0;      // of another ring, through which dy comes twice; 0: it stays as x does
  int reach = 0;            // positions around a block's own that its maps need
  bool everywhere = false;  // the maps of a block are of all positions
  int margin = 0;           // numbers of a map in front of those of the block's own positions
  int pitch = 0, received = 0, working = 0;  // numbers of a map, of all that blocks send of a sample, and beside them
  int own_pitch = 0;                         // of a map of the block's own positions
  int partial_step = 0;  // from a sample's partial statistics to the next one's, where both are kept
  int ring = 0, again = 0, maps = 0, results = 0, saved = 0, totals = 0, barriers = 0;
};

// Where a block keeps what, in bytes from the start of its shared memory.
struct SharedLayout {
  int x = 0, dy = 0;                        // the tile
  int residual = 0;                         // of the same size
  int local = 0;                            // the maps at the tile's positions
  int partial = 0;                          // statistics of the tile's slices of channels
  int owned = 0;                            // maps of the positions the block keeps for its cluster, or sums under way
  int weight = 0, bias = 0, threshold = 0;  // of the tile, in the type of the sums
  int dweight = 0, dbias = 0, dthreshold = 0;  // their gradients so far
  int reduction = 0;                           // one number per warp
  int totals = 0;                              // of whole fields: what the block adds to its row
  int pitch = 0;                               // numbers from one map of the tile to the next
  int bytes = 0;
};

enum class StageKind : int { statistics, merge, passes, deviations, merge_deviations, apply };

// Items of one kind, as many for every chunk of samples. An item waits for all items of the stage before it.
struct Stage {
  StageKind kind = StageKind::apply;
  int items = 0;
  int lag = 0;  // chunks that the first stage is ahead
  int first_pass = 0, end_pass = 0;
};
constexpr int kMaxStages = kMaxPasses + 5;

// Tiles pass through one block at a time; maps and partial statistics lie in global memory.
struct Staged {
  Stage stage[kMaxStages];
  int stages = 0;
  int items = 0;  // of all stages for one chunk
  int chunks = 1;
  int64_t chunk_samples = 1;
  int units = 1;             // of a chunk: sets of samples whose statistics are taken together
  int64_t unit_samples = 1;  // 1 but over the batch
  int spans = 1;             // of a chunk: sets of samples that an item of the last stage goes through
  int64_t span_samples = 1;
  int tile_positions = 1, tile_channels = 1;    // of statistics,
  int apply_positions = 1, apply_channels = 1;  // and of the last stage
  SharedLayout apply_shared;                    // where that keeps what
  Slices slices;
  int row_items = 1;  // blocks that share the passes over one map
  int64_t map_rows = 1;
  int* counters = nullptr;  // a ticket, then one counter per stage and chunk; zero before the launch
  void* maps = nullptr;     // scratch maps, each of map_rows rows
  void* merged = nullptr;  // over the batch, and of whole fields: statistics, or sums over rows, before they are merged
};

// Sums over partial sums: result[column] = factor * sum over the rows of source[row * row_step + column * column_step].
struct Reduction {
  const void* source = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t row_step = 0, column_step = 0;
  double factor = 1;
  Parameter sigma;  // where it is there, the column's is one more factor
  Parameter result;
  int numbers = 1;        // side by side, that a thread takes at once as if they were one column:
  int block_columns = 1;  // a power of two, at most those of a warp: its other lanes take rows
  int64_t sets = 0;       // of block_columns columns each
  int slices = 1;         // blocks that share the rows of a set
};

constexpr int kMostReductions = 4;
constexpr int kFinishThreads = 256;
constexpr int kFinishColumns = 32;                 // of a block, at most
constexpr int kLoadsTogether = 8;                  // of a thread
constexpr int kMostSlices = 64;                    // their sums are one more set of rows
constexpr int kLoadsOfSlice = 2 * kLoadsTogether;  // of a thread, from where on another block takes part
// Of a block that sums inside the kernel, kLoadsTogether after another: more are left to a launch, which has the whole
// device.
constexpr int kMostRoundsInside = 8;

struct FinishArguments {
  Reduction reduction[kMostReductions];
  int count = 0;
  void* slices = nullptr;   // kFinishColumns sums of every block
  int* counters = nullptr;  // of each set, how many of its slices are done; zero before the launch
};

// The same made at the end of the kernel that leaves the partial sums, by the last blocks of its grid
// (finish_inside.h).
struct FinishInside {
  FinishArguments sums;       // none: a launch behind the kernel makes them, or there are none to make
  int blocks = 0;             // that make them
  int64_t grid = 0;           // all blocks of the launch
  uint64_t number = 0;        // of the launch, what a flag shows when its block's partial sums are there
  uint64_t* flags = nullptr;  // (blocks, grid); before the launch any numbers but that, after it zero
};

struct Arguments {
  Shape shape;
  Tensors tensors;
  Partials partials;
  Resident resident;
  Pipeline pipeline;
  Staged staged;
  SharedLayout shared;
  FinishInside inside;
  TensorMap boxed[boxed::count][2];  // by pipeline.boxes
};
static_assert(sizeof(Arguments) <= 4096, "what a kernel can be told");

struct ClearArguments {
  int* numbers = nullptr;
  int64_t count = 0;
};

}  // namespace divnorm::cuda
