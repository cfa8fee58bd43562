// What stands behind the norm, at the last step of every kernel: a template argument of it, made from the problem.
//
// An epilogue's `rows<R, Along>(at, stride, place)` stands behind R rows of numbers, the first of them number `at` of
// the tensors and the next ones `stride` further on. Their parameters are at `place`: one for each row, or Along one
// for each number of a row. Of number i of row r, value<V>(z, r, i) is what becomes of z, gradient<V>(grad, z, r, i)
// what of its gradient reaches z, stopped<V> the rest; keep<Stream>(grad, r, i) writes the former down as the
// residual's. Smooth activations are not among them (smooth.h), but what backward has behind their gradients is.
#pragma once

#include <limits>

#include "../problem.h"
#include "lanes.h"
#include "parameters.h"
#include "simd.h"

namespace divnorm::DIVNORM_ISA {

inline bool is_smooth(const Problem& problem) { return problem.activation >= Activation::silu; }

// What an epilogue reads beside z, and what it writes beside the kernel: absent, or tensors of x's layout and, where
// the kernels have their parameters, the threshold.
template <class T>
struct Beside {
  const T* residual = nullptr;
  const Acc<T>* threshold = nullptr;
  T* dresidual = nullptr;
};

// Nothing, or a ReLU.
template <class T>
class Clamped {
 public:
  static constexpr bool kStops = false;  // whether what stops is a parameter's gradient

  explicit Clamped(const Problem& problem) : floor_(problem.template floor<Acc<T>>()) {}

  template <int R, bool Along>
  Clamped rows(int64_t, int64_t, int64_t) const {
    return *this;
  }
  template <class V>
  V value(V z, int64_t, int64_t) const {
    return rectified<V>(z, floor_);
  }
  template <class V>
  V gradient(V grad, V z, int64_t, int64_t) const {
    return passed<V>(grad, z, floor_);
  }
  template <bool Stream, class V>
  void keep(V, int64_t, int64_t) const {}

 private:
  Acc<T> floor_;
};

// Backward's of the gradients that a smooth activation has made: they are z's already.
class Untouched {
 public:
  static constexpr bool kStops = false;

  template <int R, bool Along>
  Untouched rows(int64_t, int64_t, int64_t) const {
    return {};
  }
  template <class V>
  V gradient(V grad, V, int64_t, int64_t) const {
    return grad;
  }
  template <bool Stream, class V>
  void keep(V, int64_t, int64_t) const {}
};

// The residual's numbers of some rows, and its gradient's; both may be absent.
template <class T>
class Added {
 public:
  Added(const Beside<T>& beside, int64_t at, int64_t stride)
      : residual_(beside.residual == nullptr ? nullptr : beside.residual + at),
        dresidual_(beside.dresidual == nullptr ? nullptr : beside.dresidual + at),
        stride_(stride) {}

  template <class V>
  V to(V z, int64_t r, int64_t i) const {
    return residual_ == nullptr ? z : z + load<V>(residual_ + r * stride_ + i);
  }
  template <bool Stream, class V>
  void keep(V grad, int64_t r, int64_t i) const {
    if (dresidual_ != nullptr) write<Stream>(dresidual_ + r * stride_ + i, grad);
  }

 private:
  const T* residual_;
  T* dresidual_;
  int64_t stride_;
};

// max(z + residual, threshold); a ReLU and nothing have thresholds too, behind a residual and where kernels serve more
// than one of them.
template <class T>
class Thresholded {
 public:
  static constexpr bool kStops = true;

  explicit Thresholded(const Beside<T>& beside) : beside_(beside) {}

  template <int R, bool Along>
  class Rows : public Added<T> {
   public:
    Rows(const Beside<T>& beside, int64_t at, int64_t stride, int64_t place)
        : Added<T>(beside, at, stride), along_(beside.threshold + place) {
      for (int r = 0; r < R; ++r) own_[r] = Along ? 0 : along_[r];
    }
    template <class V>
    V value(V z, int64_t r, int64_t i) const {
      return raised(this->to(z, r, i), threshold<V>(r, i));
    }
    template <class V>
    V gradient(V grad, V z, int64_t r, int64_t i) const {
      return above(grad, this->to(z, r, i), threshold<V>(r, i));
    }
    template <class V>
    V stopped(V grad, V z, int64_t r, int64_t i) const {
      return not_above(grad, this->to(z, r, i), threshold<V>(r, i));
    }

   private:
    template <class V>
    V threshold(int64_t r, int64_t i) const {
      if constexpr (Along)
        return load<V>(along_ + i);
      else
        return splat<V>(own_[r]);
    }

    const Acc<T>* along_;
    Acc<T> own_[R];  // out of memory that stores could change
  };

  template <int R, bool Along>
  Rows<R, Along> rows(int64_t at, int64_t stride, int64_t place) const {
    return {beside_, at, stride, place};
  }

 private:
  Beside<T> beside_;
};

// Whether backward has to look at the signs of v, or at more than v; its kernels that do serve fields without division
// too, which are rare.
inline bool needs_more_than_v(const Problem& problem, bool l1) {
  return l1 || problem.p == 1 || problem.keeps_mean() || !problem.suppression.present;
}

// Whether an epilogue that is no smooth activation has to be Thresholded, whatever kernels there are.
inline bool has_thresholds(const Problem& problem) {
  return !is_smooth(problem) && (problem.residual || problem.activation == Activation::tlu);
}

// Those of a problem whose kernels take them: given, or what a ReLU and nothing amount to.
template <class T, class Place>
Values<Acc<T>> thresholds(const Problem& problem, const ForwardTensors& tensors, const Place& place) {
  using A = Acc<T>;
  const int64_t count = kGeneral<T> || has_thresholds(problem) ? problem.affine_size() : 0;
  const A least = problem.activation == Activation::relu ? A(0) : -std::numeric_limits<A>::infinity();
  return {tensors.threshold, count, least, place};
}

// Backward's: where y is at most that, it is no gradient's. A threshold that is a NaN stops all but NaNs, and nothing
// stops nothing. Kernels that look at more than v are given them always.
template <class T, class Place>
Values<Acc<T>> thresholds(const Problem& problem, const BackwardTensors& tensors, const Place& place) {
  using A = Acc<T>;
  using Limits = std::numeric_limits<A>;
  const bool used = kGeneral<T> || has_thresholds(problem) || needs_more_than_v(problem, tensors.dl1 != 0);
  const A bound = problem.activation == Activation::relu ? A(0) : Limits::quiet_NaN();
  return {tensors.threshold, used ? problem.affine_size() : 0, bound, place, Limits::infinity()};
}

template <class T>
Beside<T> beside(const ForwardTensors& tensors, const Acc<T>* threshold) {
  return {static_cast<const T*>(tensors.residual), threshold};
}
template <class T>
Beside<T> beside(const BackwardTensors& tensors, const Acc<T>* threshold) {
  return {static_cast<const T*>(tensors.residual), threshold, static_cast<T*>(tensors.dresidual)};
}

// body(epilogue), of an activation that is not smooth.
template <class T, class Body>
inline auto with_epilogue(const Problem& problem, const Beside<T>& beside, Body&& body) {
  const Thresholded<T> thresholded(beside);
  if constexpr (kGeneral<T>)
    return body(thresholded);
  else
    return has_thresholds(problem) ? body(thresholded) : body(Clamped<T>(problem));
}

// What backward has to look at beside v and the gradients: nothing; y, which stopped some of them; or that and signs of
// v, or a numerator other than v.
enum class Kinks { none, epilogue, signs };
template <Kinks K>
using KinksConstant = std::integral_constant<Kinks, K>;

// body(epilogue, kinks, whether the gradients are a smooth activation's)
template <class T, class Body>
inline auto with_kinks(const Problem& problem, const Beside<T>& beside, bool l1, Body&& body) {
  constexpr std::bool_constant<std::is_same_v<T, Acc<T>>> either{};  // one type serves both
  constexpr KinksConstant<Kinks::none> none{};
  constexpr KinksConstant<Kinks::epilogue> epilogue{};
  constexpr KinksConstant<Kinks::signs> signs{};
  const bool smooth = is_smooth(problem), with_signs = kGeneral<T> || needs_more_than_v(problem, l1);
  if constexpr (!either)
    if (smooth) {
      if constexpr (!kGeneral<T>)
        if (!with_signs) return body(Untouched{}, none, std::true_type{});
      return body(Untouched{}, signs, std::true_type{});
    }
  // of a smooth activation the residual is part of the gradients
  const Thresholded<T> thresholded(smooth ? Beside<T>{nullptr, beside.threshold, nullptr} : beside);
  if constexpr (!kGeneral<T>)
    if (!with_signs) {
      const Clamped<T> clamped(problem);
      if (has_thresholds(problem)) return body(thresholded, epilogue, either);
      return problem.activation == Activation::relu ? body(clamped, epilogue, either) : body(clamped, none, either);
    }
  return body(thresholded, signs, either);
}

// body(the exponent of s); with 1 sign(v) is looked at instead of v, which serves too where nothing is divided.
template <Kinks K, class Body>
inline void with_exponent(const Problem& problem, Body&& body) {
  if constexpr (K == Kinks::signs)
    if (problem.p == 1 || !problem.suppression.present) return body(std::integral_constant<int, 1>{});
  body(std::integral_constant<int, 2>{});
}

// Whether streaming stores that fit dx fit the residual's gradient too.
inline bool stream_alike(const BackwardTensors& tensors) {
  const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes; };
  return tensors.dresidual == nullptr || at(tensors.dx) == at(tensors.dresidual);
}

// Whether somebody wants the sums of what thresholds stop.
inline bool learns_thresholds(const Problem& problem, const BackwardTensors& tensors) {
  return problem.activation == Activation::tlu && tensors.dthreshold.data != nullptr;
}

}  // namespace divnorm::DIVNORM_ISA
