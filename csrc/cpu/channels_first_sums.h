// What is summed over the channels of x of shape (batch, channels, positions), positions contiguous: pixels lie in the
// lanes, and runs of channels stream by. One unit is one group.
#pragma once

#include "slots.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kFirstRun = 8, kLongRun = 32;  // channels summed in registers: at first, and at most
constexpr int64_t kRunBytes = 16384;             // of a run longer than the first: it stays in the nearest cache

// PerPosition: as of ChannelsFirst.
template <class T, bool PerPosition>
struct ChannelsFirstSums {
  using A = Acc<T>;
  using Wide = std::conditional_t<std::is_same_v<T, BFloat16> && !PerPosition, Pair, Vec<A>>;

  static int64_t offset(const Problem& problem, int64_t sample, int64_t channel, int64_t position) {
    return (sample * problem.channels + channel) * problem.positions() + position;
  }

  // mean = average over the unit's samples and channels, m2 = sum of (x - mean)^2.
  // Each run of channels is summed about the mean of those before it, and is no longer than they are: what its own mean
  // takes off the squares is at most half of them (Chan et al. 1983), so an offset common to all costs no digits.
  [[gnu::flatten]] static void moments(const Problem& problem, const Unit& unit, const T* x, Tile tile, Map<A> mean,
                                       Map<A> m2) {
    if (problem.group_channels() * unit.samples == 1)
      own_mean(x + offset(problem, unit.sample, unit.group, tile.begin), tile.size(), mean.at(0, tile.begin),
               m2.at(0, tile.begin));
    else
      sum_runs<true>(problem, unit, x, tile, mean, m2);
  }

  // m2 = sum of x^2: the moments of a call that subtracts no mean.
  [[gnu::flatten]] static void squares(const Problem& problem, const Unit& unit, const T* x, Tile tile, Map<A> m2) {
    sum_runs<false>(problem, unit, x, tile, Map<A>{}, m2);
  }

  // sums = sum of |x - mean| over the unit's samples and channels.
  [[gnu::flatten]] static void absolutes(const Problem& problem, const Unit& unit, const T* x, Tile tile,
                                         Map<const A> mean, Map<A> sums) {
    const int64_t stride = problem.positions(), count = tile.size();
    with_widest<Wide>(count, [&](auto widest) {
      using V = decltype(widest);
      const InSlots<V, false, A> means(mean.at(0, tile.begin), count);
      alignas(kVectorBytes) A totals[kCopyNumbers<A>];
      for_each_slot<V>(count, [&](int64_t at, int64_t, auto) { store(totals + at, splat<V>(0)); });
      each_run(problem, unit, x, tile, [&](const T* run, int64_t channels, int64_t) {
        for_slot_groups<is_pair<V> ? 2 : 4>(slot_count<V>(count), [&](auto slots, int64_t first) {
          constexpr int S = slots.value;
          int64_t from[S];
          V centre[S], sum[S];
          for (int s = 0; s < S; ++s) {
            from[s] = slot_from<V>((first + s) * kWidth<V>, count);
            centre[s] = load<V>(means.data() + (first + s) * kWidth<V>);
            sum[s] = load<V>(totals + (first + s) * kWidth<V>);
          }
          for (int64_t c = 0; c < channels; ++c)
            for (int s = 0; s < S; ++s) sum[s] += absolute(centre[s] - load<V>(run + c * stride + from[s]));
          for (int s = 0; s < S; ++s) store(totals + (first + s) * kWidth<V>, sum[s]);
        });
      });
      put_slots<V>(totals, count, sums.at(0, tile.begin));
    });
  }

 private:
  // The moments where a position has one number.
  static void own_mean(const T* x, int64_t count, A* mean, A* m2) {
    for_lanes<Vec<A>>(count, [=](auto lane, int64_t i) {
      using V = decltype(lane);
      store(mean + i, load<V>(x + i));
      store(m2 + i, splat<V>(0));
    });
  }

  // Sums of x and of its squares over the unit's samples and channels, as moments() has them, or of the squares alone.
  template <bool Mean>
  static void sum_runs(const Problem& problem, const Unit& unit, const T* x, Tile tile, Map<A> mean, Map<A> m2) {
    const int64_t stride = problem.positions(), count = tile.size();
    with_widest<Wide>(count, [&](auto widest) {
      using V = decltype(widest);
      alignas(kVectorBytes) A means[kCopyNumbers<A>], squares[kCopyNumbers<A>];
      for_each_slot<V>(count, [&](int64_t at, int64_t, auto) {
        for (A* row : {means, squares}) store(row + at, splat<V>(0));
      });
      each_run(problem, unit, x, tile, [&](const T* run, int64_t channels, int64_t seen) {
        const A per_channel = A(1) / channels, per_seen = A(1) / (seen + channels);
        for_slot_groups<is_pair<V> ? 2 : 4>(slot_count<V>(count), [&](auto slots, int64_t first) {
          constexpr int S = slots.value;
          int64_t from[S];
          V centre[S], sum[S], square[S];
          for (int s = 0; s < S; ++s) {
            from[s] = slot_from<V>((first + s) * kWidth<V>, count);
            centre[s] = sum[s] = square[s] = splat<V>(0);
          }
          if (Mean && seen == 0) {
            for (int64_t c = 0; c < channels; ++c)
              for (int s = 0; s < S; ++s) centre[s] += load<V>(run + c * stride + from[s]);
            for (int s = 0; s < S; ++s) centre[s] = centre[s] * splat<V>(per_channel);
          } else if (Mean) {
            for (int s = 0; s < S; ++s) centre[s] = load<V>(means + (first + s) * kWidth<V>);
          }
          if constexpr (Mean)
            for (int s = 0; s < S; ++s) centre[s] = finite_or_zero(centre[s]);
          for (int64_t c = 0; c < channels; ++c) {
            const T* next = run + (c + channels) * stride + from[0];
            __builtin_prefetch(next);
            if constexpr (S * sizeof(V) > 64) __builtin_prefetch(next + 64 / sizeof(T));
            for (int s = 0; s < S; ++s) {
              const V below = centre[s] - load<V>(run + c * stride + from[s]);
              if constexpr (Mean) sum[s] += below;
              square[s] += below * below;
            }
          }
          for (int s = 0; s < S; ++s) {
            A *mean_at = means + (first + s) * kWidth<V>, *square_at = squares + (first + s) * kWidth<V>;
            if constexpr (Mean) {
              const V drift = sum[s] * splat<V>(per_seen);
              store(mean_at, (seen == 0 ? centre[s] : load<V>(mean_at)) - drift);
              square[s] = rectified<V>(square[s] - sum[s] * drift, A(0));  // by rounding it could be below
            }
            store(square_at, load<V>(square_at) + square[s]);
          }
        });
      });
      if constexpr (Mean) put_slots<V>(means, count, mean.at(0, tile.begin));
      put_slots<V>(squares, count, m2.at(0, tile.begin));
    });
  }

  // body(pointer to the run's first row, its channels, channels before it) for runs of channels, no longer than what
  // was before them.
  template <class Body>
  static void each_run(const Problem& problem, const Unit& unit, const T* x, Tile tile, Body&& body) {
    const int64_t first = unit.group * problem.group_channels(), end = first + problem.group_channels();
    const int64_t fitting = kRunBytes / (tile.size() * int64_t{sizeof(T)});
    const int64_t most = fitting < kFirstRun ? kFirstRun : fitting < kLongRun ? fitting : kLongRun;
    int64_t seen = 0;
    for (int64_t sample = unit.sample; sample < unit.sample + unit.samples; ++sample)
      for (int64_t c = first, length; c < end; c += length, seen += length) {
        const int64_t longest = seen == 0 ? kFirstRun : seen < most ? seen : most;
        length = longest < end - c ? longest : end - c;
        body(x + offset(problem, sample, c, tile.begin), length, seen);
      }
  }
};

}  // namespace divnorm::DIVNORM_ISA
