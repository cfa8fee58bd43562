// Small windows over channels that lie side by side: windows slide along a position's line, of whose squares each is
// added to a sum as often as windows have it. Nothing has to be turned.
#pragma once

#include "channel_passes.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kMostSlid = 9;  // channels of a window, of which each costs an addition
constexpr int64_t kSlidNumbers =
    1536;  // written long before other vectors read of them, and still in the nearest cache

// Whether the windows of a problem slide.
template <class T>
bool slides(const ChannelProblem& problem) {
  return problem.inner == 1 && !problem.exponential && problem.channels % kLanes<Acc<T>> == 0 &&
         ChannelWindow(problem).size() <= kMostSlid;
}

// Lines of numbers with zeros on either side, of one thread.
template <class A>
class PaddedLines {
 public:
  PaddedLines(int64_t lines, int64_t channels, const ChannelWindow& window)
      : pad_(divide_up(larger(window.before, window.after), kLanes<A>) * kLanes<A>),
        stride_(channels + 2 * pad_),
        numbers_(lines * stride_, true) {}

  A* line(int64_t i) const { return numbers_.data() + i * stride_ + pad_; }

 private:
  int64_t pad_, stride_;
  Buffer<A> numbers_;
};

// What a thread of a call has of its own, and of every call.
template <class T>
class Lines {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  Lines(const ChannelProblem& problem, const Numbers<A>& numbers, bool streams)
      : channels_(problem.channels),
        window_(problem),
        numbers_(numbers),
        streams_(streams),
        lines_(larger(1, kSlidNumbers / channels_)),
        squares_(lines_, channels_, window_) {}

 protected:
  // body(first, count) for the lines of a tile, some at a time.
  template <class Body>
  void each_lines(int64_t count, Body&& body) const {
    for (int64_t first = 0; first < count; first += lines_) body(first, smaller(lines_, count - first));
  }

  // body(vectors, c) for the channels c of a line, whole vectors from c on.
  template <class Body>
  void each_vectors(Body&& body) const {
    constexpr int64_t most = 4 * kLanes<A>;
    int64_t c = 0;
    for (; c + most <= channels_; c += most) body(std::integral_constant<int, 4>{}, c);
    for (; c < channels_; c += kLanes<A>) body(std::integral_constant<int, 1>{}, c);
  }

  void square(const T* x, int64_t lines) const {
    for (int64_t i = 0; i < lines; ++i)
      each_vectors([in = x + i * channels_, out = squares_.line(i)](auto vectors, int64_t c) {
        for (int64_t at = c; at < c + vectors * kLanes<A>; at += kLanes<A>) {
          const V number = load<V>(in + at);
          store(out + at, number * number);
        }
      });
  }

  // What the windows of the channels from c on have of a line.
  template <int Vectors>
  static void slide(const A* line, const ChannelWindow& window, int64_t c, V (&sums)[Vectors]) {
    const A* first = line + c - window.before;
    const int64_t size = window.size();
    for (int j = 0; j < Vectors; ++j) sums[j] = load<V>(first + j * kLanes<A>);
    for (int64_t t = 1; t < size; ++t)
      for (int j = 0; j < Vectors; ++j) sums[j] += load<V>(first + t + j * kLanes<A>);
  }

  // finish(c, powers of the divisor, pool) for the vectors of a line.
  template <class Form, class Finish>
  void each_divisor(int64_t line, Finish&& finish) const {
    const V k = splat<V>(numbers_.k), a = splat<V>(numbers_.a);
    const Exponents<A> exponents = numbers_.exponents;
    each_vectors([&, squares = squares_.line(line), window = window_](auto vectors, int64_t c) {
      V sums[vectors], d[vectors];
      slide(squares, window, c, sums);
      Bits<V> seen{};
      for (int j = 0; j < vectors; ++j) seen = exponents.seen(seen, d[j] = fused(a, sums[j], k));
      if (exponents.plain(seen))
        for (int j = 0; j < vectors; ++j)
          finish(c + j * kLanes<A>, exponents.template of_plain<Form::power>(d[j]), sums[j]);
      else
        for (int j = 0; j < vectors; ++j)
          finish(c + j * kLanes<A>, exponents.template of_any<Form::power>(d[j]), sums[j]);
    });
  }

  void write(T* to, V v) const {
    if (streams_)
      DIVNORM_ISA::write<kStreams<T>>(to, v);
    else
      DIVNORM_ISA::write<false>(to, v);
  }

  int64_t channels_;
  ChannelWindow window_;
  const Numbers<A>& numbers_;
  bool streams_;
  int64_t lines_;
  PaddedLines<A> squares_;
};

template <class T>
class ForwardLines : Lines<T> {
 public:
  using typename Lines<T>::V;
  using Lines<T>::Lines;

  // y of `count` positions.
  template <class Form>
  void run(Form, int64_t count, const T* x, T* y) const {
    this->each_lines(count, [&](int64_t first, int64_t lines) {
      const int64_t at = first * this->channels_;
      this->square(x + at, lines);
      for (int64_t i = 0; i < lines; ++i)
        this->template each_divisor<Form>(i, [&, in = x + at + i * this->channels_, out = y + at + i * this->channels_](
                                                 int64_t c, const auto& of, V) {
          const V number = load<V>(in + c);
          this->write(out + c, Form::squared ? number * number * of.power : number * of.power);
        });
    });
  }
};

template <class T>
class BackwardLines : Lines<T> {
 public:
  using typename Lines<T>::A;
  using typename Lines<T>::V;

  BackwardLines(const ChannelProblem& problem, const Numbers<A>& numbers, const ChannelBackward& call, bool streams)
      : Lines<T>(problem, numbers, streams),
        learns_(call.dlearned != nullptr),
        transposed_(this->window_.transposed()),
        weighed_(this->lines_, problem.channels, this->window_),
        passed_(this->lines_ * problem.channels) {}

  // dx, where it is wanted, of `count` positions.
  template <class Form>
  void run(Form, int64_t count, const T* x, const T* dy, T* dx) {
    this->each_lines(count, [&](int64_t first, int64_t lines) {
      const int64_t at = first * this->channels_;
      this->square(x + at, lines);
      specialize(
          [&](auto learns) {
            for (int64_t i = 0; i < lines; ++i) {
              const int64_t line = at + i * this->channels_;
              this->template weigh<Form, learns.value>(i, x + line, dy + line);
            }
          },
          learns_);
      for (int64_t i = 0; dx != nullptr && i < lines; ++i) {
        const int64_t line = at + i * this->channels_;
        finish(i, x + line, dx + line);
      }
    });
  }

  ScalarSums take_sums() { return totals_.take(); }

 private:
  // What dx has of the numerator, and u = dy n D^-(beta + 1).
  template <class Form, bool Learns>
  void weigh(int64_t i, const T* x, const T* dy) {
    A *passed = passed_.data() + i * this->channels_, *weighed = weighed_.line(i);
    this->template each_divisor<Form>(i, [=, totals = &totals_](int64_t c, const auto& of, V pool) {
      const Weighed<Form, V> found(load<V>(x + c), load<V>(dy + c), of);
      if constexpr (Learns) totals->add(found, of, pool);
      store(passed + c, found.passed);
      store(weighed + c, found.u);
    });
  }

  // dx, with what x does in the divisors of its neighbours.
  void finish(int64_t i, const T* x, T* dx) const {
    const V factor = splat<V>(-2 * this->numbers_.a * this->numbers_.exponents.beta());
    const A *passed = passed_.data() + i * this->channels_, *weighed = weighed_.line(i);
    this->each_vectors([=](auto vectors, int64_t c) {
      V sums[vectors];
      this->slide(weighed, transposed_, c, sums);
      for (int j = 0; j < vectors; ++j) {
        const int64_t at = c + j * kLanes<A>;
        this->write(dx + at, fused<V>(factor * load<V>(x + at), sums[j], load<V>(passed + at)));
      }
    });
  }

  bool learns_;
  ChannelWindow transposed_;
  PaddedLines<A> weighed_;
  Buffer<A> passed_;
  ScalarTotals<A> totals_;
};

}  // namespace divnorm::DIVNORM_ISA
