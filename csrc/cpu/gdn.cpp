// Elementwise passes over parts that a cache holds. Compiled once per instruction set, as kernels.cpp is.
#include <cmath>
#include <limits>

#include "entries.h"
#include "partials.h"
#include "roots.h"
#include "threads.h"

namespace divnorm::DIVNORM_ISA {

namespace {

template <class V>
inline auto is_normal(V v) {
  using Limits = std::numeric_limits<typename Lane<V>::type>;
  const V size = absolute(v);
  return size >= splat<V>(Limits::min()) && size <= splat<V>(Limits::max());  // a NaN is neither
}

// How D acts on x, by the two flags of a form as types.
template <bool Inverse, bool Simplified>
struct Form {
  template <class V>
  static V pooled(V x) {
    return Simplified ? absolute(x) : x * x;
  }
  template <class V>
  static V applied(V x, V d) {
    const V size = Simplified ? d : root(d);
    return Inverse ? x * size : x / size;
  }
  // f(D)
  template <class V>
  static V factor(V d) {
    const V size = Simplified ? d : root(d);
    return Inverse ? size : splat<V>(1) / size;
  }
  // dy x f'(D), of f = f(D); x f first, which is y and no larger than it has to be
  template <class V>
  static V slope(V dy, V x, V f) {
    if constexpr (Inverse && Simplified)
      return dy * x;
    else if constexpr (Inverse)
      return splat<V>(0.5) * dy * x / f;
    else if constexpr (Simplified)
      return -(dy * (x * f)) * f;
    else
      return splat<V>(-0.5) * dy * (x * f) * f * f;
  }
  template <class V>
  static V gradient(V x, V e, V ds) {
    return e + (Simplified ? sign(x) * ds : splat<V>(2) * x * ds);
  }
};

// body(at, scratch, count) on runs of a part's numbers, which begin `at` and `scratch` numbers behind its first ones.
// False as soon as a body is false.
template <class Body>
bool each_run(const GdnPart& part, int threads, Body&& body) {
  const int64_t numel = part.numel();
  const int64_t useful = larger(1, numel / kThreadGrain);
  Threads team(static_cast<int>(threads < useful ? threads : useful), 1, true);
  bool all = true;
  team.run([&](const Member& member) {
    member.share(0, numel, [&](int64_t from, int64_t to) {
      bool mine = true;
      while (mine && from < to) {
        const int64_t row = from / part.columns, column = from % part.columns;
        const int64_t block = row / part.rows, place = row % part.rows;
        const int64_t rest = part.columns - column, count = rest < to - from ? rest : to - from;
        mine = body(block * part.block_stride + place * part.row_stride + column,
                    block * part.scratch_block_stride + place * part.scratch_row_stride + column, count);
        from += count;
      }
      stream_fence();
      if (!mine) __atomic_store_n(&all, false, __ATOMIC_RELAXED);
    });
  });
  return all;
}

// The same for a body that each number's vector is enough for: body(V{}, at, scratch).
template <class A, class Body>
void each_lanes(const GdnPart& part, int threads, Body&& body) {
  each_run(part, threads, [&](int64_t at, int64_t scratch, int64_t count) {
    for_lanes<Vec<A>>(count, [&](auto v, int64_t i) { body(v, at + i, scratch + i); });
    return true;
  });
}

// The same for a body that gives what to write to a tensor like x.
template <class T, class Body>
void write_lanes(const GdnPart& part, int threads, T* out, Body&& body) {
  specialize_if<kStreams<T>>(
      [&](auto streams) {
        each_run(part, threads, [&](int64_t at, int64_t scratch, int64_t count) {
          for_lanes_writing<Vec<Acc<T>>, streams.value>(out + at, count, [&](auto v, int64_t i) {
            write<streams.value>(out + at + i, body(v, at + i, scratch + i));
          });
          return true;
        });
      },
      part.tensor_numel * int64_t{sizeof(T)} >= kStreamBytes);
}

// work(T{}, Form) for the part's dtype and form.
template <class Work>
void dispatch(const GdnPart& part, Work&& work) {
  specialize(
      [&](auto inverse, auto simplified) {
        const Form<inverse.value, simplified.value> form;
        switch (part.dtype) {
          case Dtype::float64: return work(double{}, form);
          case Dtype::float32: return work(float{}, form);
          case Dtype::bfloat16: return work(BFloat16{}, form);
          case Dtype::float16: return work(Float16{}, form);
        }
      },
      part.inverse, part.simplified);
}

void pool(const GdnPart& part, int threads, const void* x, void* s) {
  dispatch(part, [&](auto type, auto form) {
    using T = decltype(type);
    using A = Acc<T>;
    each_lanes<A>(part, threads, [&](auto v, int64_t at, int64_t scratch) {
      using V = decltype(v);
      store(static_cast<A*>(s) + scratch, form.pooled(load<V>(static_cast<const T*>(x) + at)));
    });
  });
}

void forward(const GdnPart& part, int threads, const void* x, void* y, const void* d) {
  dispatch(part, [&](auto type, auto form) {
    using T = decltype(type);
    using A = Acc<T>;
    write_lanes(part, threads, static_cast<T*>(y), [&](auto v, int64_t at, int64_t scratch) {
      using V = decltype(v);
      return form.applied(load<V>(static_cast<const T*>(x) + at), load<V>(static_cast<const A*>(d) + scratch));
    });
  });
}

void slope(const GdnPart& part, int threads, const void* dy, const void* x, const void* d, void* e, void* dd) {
  dispatch(part, [&](auto type, auto form) {
    using T = decltype(type);
    using A = Acc<T>;
    each_lanes<A>(part, threads, [&](auto v, int64_t at, int64_t scratch) {
      using V = decltype(v);
      const V factor = form.factor(load<V>(static_cast<const A*>(d) + scratch));
      const V grad = load<V>(static_cast<const T*>(dy) + at), value = load<V>(static_cast<const T*>(x) + at);
      store(static_cast<A*>(e) + scratch, grad * factor);
      store(static_cast<A*>(dd) + scratch, form.slope(grad, value, factor));
    });
  });
}

template <class A, class F>
bool slope_of_result_in(const GdnPart& part, int threads, const A* dy, const A* x, const A* y, A* s, A* e, A* dd,
                        F form) {
  return each_run(part, threads, [&](int64_t at, int64_t scratch, int64_t count) {
    Totals<A, 1> untold;
    for_lanes<Vec<A>>(count, [&](auto v, int64_t i) {
      using V = decltype(v);
      const V grad = load<V>(dy + at + i), value = load<V>(x + at + i), result = load<V>(y + at + i);
      const V factor = result / value;
      untold.add(0, is_normal(value) && is_normal(result) ? splat<V>(0) : splat<V>(1));
      store(s + scratch + i, form.pooled(value));
      store(e + scratch + i, grad * factor);
      store(dd + scratch + i, form.slope(grad, value, factor));
    });
    return untold.value(0) == 0;
  });
}

bool slope_of_result(const GdnPart& part, int threads, const void* dy, const void* x, const void* y, void* s, void* e,
                     void* dd) {
  bool told = false;
  dispatch(part, [&](auto type, auto form) {
    using A = decltype(type);
    if constexpr (std::is_same_v<A, Acc<A>>)
      told = slope_of_result_in<A>(part, threads, static_cast<const A*>(dy), static_cast<const A*>(x),
                                   static_cast<const A*>(y), static_cast<A*>(s), static_cast<A*>(e),
                                   static_cast<A*>(dd), form);
  });
  return told;
}

void backward(const GdnPart& part, int threads, const void* x, void* dx, const void* e, const void* ds) {
  dispatch(part, [&](auto type, auto form) {
    using T = decltype(type);
    using A = Acc<T>;
    write_lanes(part, threads, static_cast<T*>(dx), [&](auto v, int64_t at, int64_t scratch) {
      using V = decltype(v);
      const V through = load<V>(static_cast<const A*>(ds) + scratch);
      return form.gradient(load<V>(static_cast<const T*>(x) + at), load<V>(static_cast<const A*>(e) + scratch),
                           through);
    });
  });
}

}  // namespace

const GdnKernels gdn_kernels{pool, forward, slope, slope_of_result, backward};

}  // namespace divnorm::DIVNORM_ISA
