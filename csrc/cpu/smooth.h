// Smooth activations behind rows of numbers: many numbers at once, in a copy that stays in the nearest cache, since
// they are compiled in activations.cpp and a call has constants to load.
//
// each(r, body) calls body(V{}, at, from, again) over row r: `at` is a value's place in the copy, `from` its place in
// the row, and `again` as slots.h has it. z(V{}, r, at, from, again) is that value before the residual is added.
#pragma once

#include <optional>

#include "epilogue.h"
#include "slots.h"

namespace divnorm::DIVNORM_ISA {

// The activations and their slopes, in place.
template <class V>
void smooth_values(V* z, int64_t count, Activation activation);
template <class V>
void smooth_slopes(V* z, int64_t count, Activation activation);

// A thread's room for copies: of some rows, and of as many of a unit's gradients as stay in a near cache from the look
// that makes them to the one that uses them. Both looks ask for the same copies in the same order.
template <class A>
class SmoothRoom {
 public:
  SmoothRoom(A* rows, int64_t size, A* kept, int64_t most_kept)
      : rows_(rows), kept_numbers_(kept), size_(size), most_kept_(most_kept) {}

  A* rows() const { return rows_; }
  int64_t size() const { return size_; }

  void first_look() { used_ = kept_ = 0; }
  void second_look() { used_ = 0; }

  // Where to keep a copy of `count` numbers, or null from the first one that has no place.
  A* keep(int64_t count) {
    if (used_ > kept_ || used_ + count > most_kept_) {
      used_ = most_kept_ + 1;
      return nullptr;
    }
    kept_ = used_ + count;
    return next(count);
  }

  // Where that copy is, or null from the first one that is not all there.
  const A* kept(int64_t count) {
    if (used_ + count <= kept_) return next(count);
    used_ = most_kept_ + 1;
    return nullptr;
  }

 private:
  A* next(int64_t count) {
    A* found = kept_numbers_ + used_;
    used_ += count;
    return found;
  }

  A *rows_, *kept_numbers_;
  int64_t size_, most_kept_, used_ = 0, kept_ = 0;
};

// That of every thread of a call, where there is a smooth activation.
template <class A>
class SmoothRooms {
 public:
  // For four rows of `longest` numbers at least; of a unit are `rows` such rows where there are two looks at it.
  SmoothRooms(const Problem& problem, int threads, int64_t longest, int64_t rows = 0) {
    if (!is_smooth(problem)) return;
    size_ = larger(kFewest, whole_lines(4 * (longest + kMore)));
    most_kept_ = smaller(whole_lines(rows * (longest + kMore)), kKeptBytes / sizeof(A));
    rows_.emplace(threads * size_);
    kept_.emplace(threads * most_kept_);
  }

  SmoothRoom<A> of(int thread) const {
    if (!rows_) return {nullptr, 0, nullptr, 0};
    return {rows_->data() + thread * size_, size_, kept_->data() + thread * most_kept_, most_kept_};
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(A);
  static constexpr int64_t kFewest = 4096, kMore = 3 * kLine;  // what a copy's width is beside its numbers
  static constexpr int64_t kKeptBytes = 256 * 1024;

  static int64_t whole_lines(int64_t count) { return divide_up(count, kLine) * kLine; }

  int64_t size_ = 0, most_kept_ = 0;
  std::optional<Buffer<A>> rows_, kept_;
};

// each(r, body) over rows of `count` numbers that lie `stride` apart and are written to `out`.
template <class V, bool Stream, class T>
inline auto lane_places(const T* out, int64_t stride, int64_t count) {
  return [=](int64_t r, auto&& body) {
    for_lanes_writing<V, Stream>(out + r * stride, count, [&](auto lane, int64_t i) { body(lane, i, i, NoneAgain{}); });
  };
}

// What is made of rows of numbers that lie `stride` apart.
template <class T, class Wide>
class SmoothRows {
 public:
  using A = Acc<T>;

  SmoothRows(const Problem& problem, const Beside<T>& beside, const SmoothRoom<A>& room)
      : activation_(problem.activation), residual_(beside.residual), size_(room.size()), numbers_(room.rows()) {}

  // How many rows of `count` numbers there is room for: whole blocks, where not all of `left`.
  int64_t room(int64_t count, int64_t left) const {
    const int64_t rows = size_ / width(count);
    return left <= rows ? left : rows / 4 * 4;
  }

  // From one copied row to the next: whole vectors, and long rows not on the same lines of the cache.
  static int64_t width(int64_t count) {
    const int64_t lanes = count < kWidth<Wide> ? kLanes<A> : kWidth<Wide>, whole = divide_up(count, lanes) * lanes;
    return whole % (32 * kLine) == 0 ? whole + kLine : whole;
  }

  // Copies of the activations of rows from number `at` of the tensors on.
  template <class Each, class Z>
  [[gnu::noinline]] const A* values(int64_t at, int64_t rows, int64_t stride, int64_t count, Each each, Z z) const {
    normalize(at, rows, stride, count, each, z, numbers_);
    smooth_values(reinterpret_cast<Vec<A>*>(numbers_), rows * width(count) / kLanes<A>, activation_);
    return numbers_;
  }

  // Of what dy's gradients become, in `copies` or where that is null in room of its own.
  template <class Each, class Z>
  [[gnu::noinline]] const A* gradients(int64_t at, int64_t rows, int64_t stride, int64_t count, Each each, Z z,
                                       const T* dy, A* copies) const {
    if (copies == nullptr) copies = numbers_;
    normalize(at, rows, stride, count, each, z, copies);
    smooth_slopes(reinterpret_cast<Vec<A>*>(copies), rows * width(count) / kLanes<A>, activation_);
    for (int64_t r = 0; r < rows; ++r) {
      A* copy = copies + r * width(count);
      const T* given = dy + at + r * stride;
      each(r, [=](auto lane, int64_t at, int64_t from, auto) {
        using V = decltype(lane);
        store(copy + at, load<V>(given + from) * load<V>(copy + at));
      });
    }
    return copies;
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(A);

  template <class Each, class Z>
  void normalize(int64_t at, int64_t rows, int64_t stride, int64_t count, Each& each, Z& z, A* copies) const {
    const int64_t end = width(count);
    for (int64_t r = 0; r < rows; ++r) {
      A* copy = copies + r * end;
      for (int64_t i = count / kLanes<A> * kLanes<A>; i < end; ++i) copy[i] = 0;  // calculated with too
      const T* added = residual_ == nullptr ? nullptr : residual_ + at + r * stride;
      each(r, [&](auto lane, int64_t at, int64_t from, auto again) {
        using V = decltype(lane);
        const V value = z(lane, r, at, from, again);
        store(copy + at, added == nullptr ? value : value + load<V>(added + from));
      });
    }
  }

  Activation activation_;
  const T* residual_;
  int64_t size_;
  A* numbers_;
};

// Some rows of gradients, in memory or copied.
template <class G>
struct GradientRows {
  const G* first;
  int64_t stride;
  bool copied;

  const G* row(int64_t r) const { return first + r * stride; }
  // Of a row's number.
  int64_t place(int64_t at, int64_t from) const { return copied ? at : from; }
};

// Which look at a unit's gradients it is: the second one writes the residual's.
enum class Look { first, second };

// Where backward has the gradients of z from: dy itself, or what a smooth activation makes of it. Of half types only
// Sloped ones are of the type of the sums.
template <class T, class Wide, bool Sloped>
class Gradients {
 public:
  using A = Acc<T>;
  using G = std::conditional_t<Sloped, A, T>;

  Gradients(const Problem& problem, const Beside<T>& beside, SmoothRoom<A>& room, const T* dy, Look look)
      : dy_(dy),
        dresidual_(beside.dresidual),
        smooth_(is_smooth(problem)),
        look_(look),
        room_(room),
        rows_(problem, beside, room) {}

  const T* given() const { return dy_; }
  bool smooth() const { return Sloped && smooth_; }

  // Of rows as SmoothRows has them; `left` is how many of the same kind are still to come, these among them.
  template <bool Stream, class Each, class Z>
  GradientRows<G> rows(int64_t at, int64_t rows, int64_t left, int64_t stride, int64_t count, const Each& each,
                       const Z& z) {
    if constexpr (Sloped)
      if (smooth_) {
        const int64_t width = rows_.width(count);
        if (at != next_ || held_ < rows) {
          held_ = rows_.room(count, left);
          copies_ = look_ == Look::second ? room_.kept(held_ * width) : nullptr;
          if (copies_ == nullptr)
            copies_ = rows_.gradients(at, held_, stride, count, each, z, dy_,
                                      look_ == Look::first ? room_.keep(held_ * width) : nullptr);
          if (look_ == Look::second && dresidual_ != nullptr) write_residuals<Stream>(at, stride, width, each);
        }
        const GradientRows<G> found{copies_, width, true};
        next_ = at + rows * stride;
        copies_ += rows * width;
        held_ -= rows;
        return found;
      }
    if constexpr (std::is_same_v<G, T>) return {dy_ + at, stride, false};
    __builtin_unreachable();
  }

 private:
  template <bool Stream, class Each>
  void write_residuals(int64_t at, int64_t stride, int64_t width, const Each& each) const {
    for (int64_t r = 0; r < held_; ++r) {
      const A* copy = copies_ + r * width;
      T* out = dresidual_ + at + r * stride;
      each(r, [=](auto lane, int64_t at, int64_t from, auto) {
        write<Stream>(out + from, load<decltype(lane)>(copy + at));
      });
    }
  }

  const T* dy_;
  T* dresidual_;
  bool smooth_;
  Look look_;
  SmoothRoom<A>& room_;
  SmoothRows<T, Wide> rows_;
  int64_t next_ = -1, held_ = 0;  // where the next of the copied rows are, and how many
  const A* copies_ = nullptr;     // of those
};

}  // namespace divnorm::DIVNORM_ISA
