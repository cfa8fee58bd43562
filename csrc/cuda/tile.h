// A tile: channels x positions of one sample, held in shared memory as it lies in global memory.
#pragma once

#include <type_traits>

#include "epilogue.h"
#include "maps.h"

namespace divnorm::cuda {

struct Tile {
  int64_t first = 0;  // offset of its first element in the tensor,
  int64_t line = 0;   // and the row of `pitch` elements that this lies in
  int64_t pitch = 0;  // between its rows there
  int channel = 0, channels = 0;
  int position = 0, positions = 0;
  int rows = 0, row = 0;  // contiguous stretches and their length; one behind the other in shared memory
};

// Where the tile's channels and positions lie in the tensor and, one behind the other, in shared memory.
__device__ inline void lay_out(Tile& tile, const Shape& shape, bool channels_last, int64_t sample, int group) {
  const int64_t channel = static_cast<int64_t>(group) * shape.group_channels + tile.channel;
  if (channels_last) {
    tile.line = sample * shape.positions + tile.position;
    tile.first = tile.line * shape.channels + channel;
    tile.rows = tile.positions;
    tile.row = tile.channels;
    tile.pitch = shape.channels;
  } else {
    tile.line = sample * shape.channels + channel;
    tile.first = tile.line * shape.positions + tile.position;
    tile.rows = tile.channels;
    tile.row = tile.positions;
    tile.pitch = shape.positions;
  }
  if (tile.pitch == tile.row) {
    tile.row *= tile.rows;
    tile.rows = 1;
  }
}

__device__ inline Tile tile_at(const Shape& shape, int64_t sample, int group, int channel, int channels, int position,
                               int positions) {
  Tile tile;
  tile.channel = channel;
  tile.position = position;
  tile.channels = clamped(shape.group_channels - channel, 0, channels);
  tile.positions = clamped(shape.positions - position, 0, positions);
  lay_out(tile, shape, shape.channels_last, sample, group);
  return tile;
}

// This thread's runs of Bytes of a tile, one after the other.
template <int Bytes>
class Runs {
 public:
  __device__ Runs(int rows, int row_bytes, int64_t pitch_bytes)
      : shared_(device::thread() * Bytes), end_(rows * row_bytes), row_bytes_(row_bytes) {
    const int step = device::threads() * Bytes;
    if (end_ == 0) return;
    const int rows_on = step / row_bytes;
    bytes_on_ = step - rows_on * row_bytes;
    to_next_ = rows_on * pitch_bytes + bytes_on_;
    to_next_row_ = pitch_bytes - row_bytes;
    in_row_ = shared_ % row_bytes;
    global_ = shared_ / row_bytes * pitch_bytes + in_row_;
  }
  __device__ bool more() const { return shared_ < end_; }
  // Where the run lies in the tile and in global memory, in bytes from its start.
  __device__ int shared() const { return shared_; }
  __device__ int64_t global() const { return global_; }
  __device__ void next() {
    shared_ += device::threads() * Bytes;
    global_ += to_next_;
    in_row_ += bytes_on_;
    if (in_row_ >= row_bytes_) {
      in_row_ -= row_bytes_;
      global_ += to_next_row_;
    }
  }

 private:
  int shared_, end_, row_bytes_, bytes_on_ = 0, in_row_ = 0;
  int64_t global_ = 0, to_next_ = 0, to_next_row_ = 0;
};

// Calls body(in shared memory, in global memory) for every run of Bytes of the tile, both as addresses of bytes.
template <int Bytes, class Body>
__device__ void for_each_run(unsigned char* tile, unsigned char* global, int rows, int row_bytes, int64_t pitch_bytes,
                             Body&& body) {
  if (rows == 1) {
    const int step = device::threads() * Bytes;
#pragma unroll 4
    for (int i = device::thread() * Bytes; i < row_bytes; i += step) body(tile + i, global + i);
    return;
  }
#pragma unroll 2
  for (Runs<Bytes> runs(rows, row_bytes, pitch_bytes); runs.more(); runs.next())
    body(tile + runs.shared(), global + runs.global());
}

// Runs narrower than a word into shared memory, kLoadsTogether of a thread under way at once: they go through
// registers.
template <class T>
__device__ void copy_numbers(T* tile, const T* global, int rows, int row_bytes, int64_t pitch_bytes) {
  constexpr int kSize = sizeof(T);
  for (Runs<kSize> runs(rows, row_bytes, pitch_bytes); runs.more();) {
    T* const to = tile + runs.shared() / kSize;
    const int left = (rows * row_bytes - runs.shared()) / kSize;
    T numbers[kLoadsTogether];
#pragma unroll
    for (int i = 0; i < kLoadsTogether; ++i) {
      if (i * device::threads() >= left) break;
      numbers[i] = device::load(global + runs.global() / kSize);
      runs.next();
    }
#pragma unroll
    for (int i = 0; i < kLoadsTogether; ++i)
      if (i * device::threads() < left) to[i * device::threads()] = numbers[i];
  }
}

template <int Count, class T>
__device__ Pack<T, Count> read_pack(const T* address) {
  return *reinterpret_cast<const Pack<T, Count>*>(address);
}
template <int Count, class T>
__device__ void write_pack(T* address, const Pack<T, Count>& pack) {
  *reinterpret_cast<Pack<T, Count>*>(address) = pack;
}

// Calls body(Bytes as a constant) with the widest access that the tile's addresses allow.
template <class T, class Body>
__device__ void with_access(const Tile& tile, const T* global, Body&& body) {
  const uint64_t together = reinterpret_cast<uint64_t>(global + tile.first) |
                            static_cast<uint64_t>(tile.row) * sizeof(T) |
                            (tile.rows > 1 ? static_cast<uint64_t>(tile.pitch) * sizeof(T) : 0);
  if (together % 16 == 0)
    body(std::integral_constant<int, 16>());
  else if (together % 4 == 0)
    body(std::integral_constant<int, 4>());
  else
    body(std::integral_constant<int, sizeof(T)>());
}

template <class T, class Cached = device::AsUsual>
__device__ void copy_in(const Tile& tile, const void* tensor, T* to, Cached cached = {}) {
  const T* global = static_cast<const T*>(tensor);
  const int row_bytes = tile.row * static_cast<int>(sizeof(T));
  const int64_t pitch_bytes = tile.pitch * static_cast<int64_t>(sizeof(T));
  with_access(tile, global, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    if constexpr (kBytes < kWordBytes)
      copy_numbers(to, global + tile.first, tile.rows, row_bytes, pitch_bytes);
    else
      for_each_run<kBytes>(
          reinterpret_cast<unsigned char*>(to), reinterpret_cast<unsigned char*>(const_cast<T*>(global + tile.first)),
          tile.rows, row_bytes, pitch_bytes,
          [&](unsigned char* shared, const unsigned char* from) { device::copy_async<kBytes>(shared, from, cached); });
  });
}

template <class T, class Cached = device::AsUsual>
__device__ void copy_out(const Tile& tile, const T* from, void* tensor, Cached cached = {}) {
  T* global = static_cast<T*>(tensor);
  with_access(tile, global, [&](auto bytes) {
    // in words, which a store takes as they are: bytes it would put together one by one
    using Part = std::conditional_t < decltype(bytes)::value<kWordBytes, T, uint32_t>;
    using Run = Pack<Part, decltype(bytes)::value / sizeof(Part)>;
    for_each_run<sizeof(Run)>(
        reinterpret_cast<unsigned char*>(const_cast<T*>(from)), reinterpret_cast<unsigned char*>(global + tile.first),
        tile.rows, tile.row * static_cast<int>(sizeof(T)), tile.pitch * static_cast<int64_t>(sizeof(T)),
        [&](const unsigned char* shared, unsigned char* to) {
          const auto* const run = reinterpret_cast<const Part*>(shared);
          device::store(reinterpret_cast<Run*>(to), read_pack<sizeof(Run) / sizeof(Part)>(run), cached);
        });
  });
}

// Calls body(Count as a constant) with the numbers of Bytes together where `length` is a multiple of them, else with
// half as many, and so on.
template <class T, int Bytes, class Body>
__device__ void with_vectors(int length, Body&& body) {
  constexpr int kSize = sizeof(T), kMost = Bytes < kSize ? 1 : Bytes / kSize;
  if constexpr (kMost > 1) {
    if (length % kMost != 0) return with_vectors<T, Bytes / 2>(length, body);
  }
  body(std::integral_constant<int, kMost>());
}

template <int Count, class A>
__device__ Pack<A, Count> repeated(A number) {
  Pack<A, Count> pack;
  for (int i = 0; i < Count; ++i) pack.at[i] = number;
  return pack;
}

// The first Count of an array.
template <int Count, class A, int Most>
__device__ Pack<A, Count> packed(const A (&numbers)[Most]) {
  Pack<A, Count> pack;
  for (int i = 0; i < Count; ++i) pack.at[i] = numbers[i];
  return pack;
}

// What a block needs of a position or a channel to compute the output, in shared memory. Maps are local to the tile.
template <class A>
struct Local {
  A *mean, *rstd;     // of forward and backward
  A *slope, *offset;  // of backward
  SlopeOf slope_of;
  bool absolute, keeps_mean;
};

// Parameters of a tile, where their gradients are collected, and what else stands behind the norm. Null: not there.
template <class T>
struct Affine {
  using A = Acc<T>;
  A *weight, *bias, *threshold;  // of backward, the bias is there with an activation alone
  A *dweight, *dbias, *dthreshold;
  T* residual;  // a tile as x is one
  bool per_position;
  Activation activation;
};

// A parameter as the positions of a contiguous channel see it: one number for all of them, or one for each.
template <class A, bool PerPosition>
class OfChannel {
 public:
  static constexpr bool kPerPosition = PerPosition;
  __device__ OfChannel(const A* numbers, int channel) : numbers_(PerPosition ? numbers : numbers + channel) {
    if constexpr (!PerPosition) number_ = *numbers_;
  }
  template <int Count>
  __device__ Pack<A, Count> at(int position) const {
    if constexpr (PerPosition) {
      return read_pack<Count>(numbers_ + position);
    } else {
      return repeated<Count>(number_);
    }
  }

 private:
  const A* numbers_;
  A number_ = 0;
};

// What a sweep of backward leaves beside the gradients of the parameters: that of x, and of a residual; or what comes
// before it, sums over the row.
enum class Sweep { gradient, sums };

// Over numbers of a row: of g, which is weight times the gradient in front of the activation; of g times the numerator;
// of the signs of v, which are for l1.
template <class A>
struct RowSums {
  A pull = 0, product = 0, signs = 0;

  template <int Count>
  __device__ void add(const Pack<A, Count>& upstream, const Pack<A, Count>& weight, const Pack<A, Count>& over) {
    for (int v = 0; v < Count; ++v) {
      const A g = upstream.at[v] * weight.at[v];
      pull += g;
      product += g * over.at[v];
    }
  }
};

// Calls body(whether parameters go by position, as a constant).
template <class T, class Body>
__device__ void with_parameters(const Affine<T>& affine, Body&& body) {
  if (affine.per_position)
    body(std::true_type());
  else
    body(std::false_type());
}

// value with the sign of x; 0 where x has none.
template <class A>
__device__ A signed_as(A value, A x) {
  return x > A(0) ? value : x < A(0) ? -value : A(0);
}

// What stands over the deviation.
template <Form F, class A, int Count>
__device__ Pack<A, Count> numerator(const Local<A>& local, const Pack<A, Count>& x, const Pack<A, Count>& value) {
  if constexpr (F == Form::general)
    if (local.keeps_mean) return x;
  return value;
}

// Adds the residual of the tile's numbers `at` to z.
template <Form F, class T, int Count>
__device__ void add_residual(const Affine<T>& affine, int at, Pack<Acc<T>, Count>& z) {
  if constexpr (F == Form::general) {
    if (affine.residual == nullptr) return;
    const Pack<Acc<T>, Count> residual = widen(read_pack<Count>(affine.residual + at));
    for (int v = 0; v < Count; ++v) z.at[v] += residual.at[v];
  }
}

// The residual's gradient, that of z, in its place.
template <Form F, class T, int Count>
__device__ void leave_gradient(const Affine<T>& affine, int at, const Pack<Acc<T>, Count>& gradient) {
  if constexpr (F == Form::general)
    if (affine.residual != nullptr) write_pack(affine.residual + at, narrow<T>(gradient));
}

// Takes what depends on v off dx. A zero times v would carry a NaN into a dx that no v matters to.
template <Form F, class A, int Count>
__device__ void subtract_slope(SlopeOf slope_of, const Pack<A, Count>& slope, const Pack<A, Count>& value,
                               const Pack<A, Count>& rstd, Pack<A, Count>& dx) {
  if (slope_of == SlopeOf::values)
    for (int v = 0; v < Count; ++v) dx.at[v] -= slope.at[v] * value.at[v];
  else if (slope_of == SlopeOf::normals)
    for (int v = 0; v < Count; ++v) dx.at[v] -= slope.at[v] * (value.at[v] * rstd.at[v]);
  else if (F == Form::general && slope_of == SlopeOf::signs)
    for (int v = 0; v < Count; ++v) dx.at[v] -= slope.at[v] * signed_as(A(1), value.at[v]);
}

// Parameters of a tile into shared memory: weights of one, the others zero, where there are none.
template <class T>
__device__ void load_affine(const Shape& shape, const Tensors& tensors, int group, int channel, int channels,
                            int position, int positions, const Affine<T>& to) {
  using A = Acc<T>;
  const int64_t first = shape.per_position ? position : static_cast<int64_t>(group) * shape.group_channels + channel;
  for (int i = device::thread(); i < (shape.per_position ? positions : channels); i += device::threads()) {
    to.weight[i] = tensors.weight.data == nullptr ? A(1) : read<A>(tensors.weight, first + i);
    if (to.bias != nullptr) to.bias[i] = tensors.bias.data == nullptr ? A(0) : read<A>(tensors.bias, first + i);
    if (to.threshold != nullptr)
      to.threshold[i] = tensors.threshold.data == nullptr ? A(0) : read<A>(tensors.threshold, first + i);
  }
}

// The number of channels in a slice.
__device__ inline int slice_channels(int channels, int slice, const Slices& slices) {
  return quotient(slices.by_count, channels - slice + slices.count - 1);
}

// The sum of squares about a mean from those about a pivot, and from sum and mean of the differences to that. What
// overflows is infinite, as it would be about the mean; beside an infinite number it is none.
template <class A>
__device__ A squares_about_mean(A squares, A sum, A mean) {
  if (!finite(squares)) return squares + A(0) * sum;
  const A rest = squares - sum * mean;
  return rest < A(0) ? A(0) : rest;
}

// The residual of a mean, where it is one: sums of large numbers round, sums of their differences do not.
template <class A>
__device__ A corrected(A mean, A residual) {
  return finite(residual) ? mean + residual : mean;
}

}  // namespace divnorm::cuda
