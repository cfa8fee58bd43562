// Whole fields: every field covers all positions, so the statistics of a row (a group of a sample, or of all samples)
// are two numbers, and a call is reductions and one pass, with no maps.
// A job is a block of samples of some neighbouring groups. What it is cut into depends on the sizes alone, never on the
// number of threads, so neither do the results.
#pragma once

#include <cmath>

#include "lanes.h"
#include "parameters.h"
#include "threads.h"
#include "traversal.h"

namespace divnorm::DIVNORM_ISA {

constexpr int64_t kChunk = 4096;      // numbers summed at once: looked at twice, they stay in the first-level cache
constexpr int64_t kPiece = 16384;     // numbers of one step of a pass
constexpr int64_t kJobGrain = 32768;  // numbers a job should have

struct WholeJobs {
  int64_t unit_samples, unit_groups;    // whose rows are worked on at once
  int64_t block_samples, block_groups;  // of a job
  int64_t blocks, segments;

  int64_t count() const { return blocks * segments; }

  // columns: all groups are worked on at once. along_row: jobs share samples, whose parameters they add up.
  WholeJobs(const Problem& p, bool columns, bool along_row)
      : unit_samples(p.over_batch ? p.batch : 1), unit_groups(columns ? p.groups : 1) {
    const int64_t unit = unit_samples * unit_groups * (p.numel() / p.batch / p.groups);
    const int64_t wanted = larger(1, kJobGrain / unit), neighbours = p.groups / unit_groups;
    block_groups = unit_groups * (along_row ? 1 : smaller(wanted, neighbours));
    block_samples = unit_samples;
    if (!p.over_batch)
      block_samples = smaller(p.batch, along_row ? larger(kFeatureSamples, wanted) : larger(1, wanted / neighbours));
    blocks = divide_up(p.batch, block_samples);
    segments = divide_up(p.groups, block_groups);
  }
};

// One row of statistics, or for columns all groups of the samples.
struct WholeUnit {
  Unit rows;
  int64_t block = 0;
  bool fresh = false;  // the first of its block's samples
  int64_t row(const Problem& p) const { return (p.over_batch ? 0 : rows.sample) * p.groups + rows.group; }
};

// make(team) gives a thread its pass, an object with work(unit, member).
template <class Make>
void walk_whole(const Problem& p, const WholeJobs& jobs, Threads& threads, Make&& make) {
  threads.run([&](Member member) {
    auto pass = make(member);
    const int64_t begin = member.team * jobs.count() / member.teams;
    const int64_t end = (member.team + 1) * jobs.count() / member.teams;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t block = job / jobs.segments, first_group = job % jobs.segments * jobs.block_groups;
      const int64_t first = block * jobs.block_samples, last = smaller(first + jobs.block_samples, p.batch);
      const int64_t last_group = smaller(first_group + jobs.block_groups, p.groups);
      for (int64_t sample = first; sample < last; sample += jobs.unit_samples)
        for (int64_t group = first_group; group < last_group; group += jobs.unit_groups) {
          const Unit rows{sample, jobs.unit_samples, group, jobs.unit_groups};
          pass.work(WholeUnit{rows, block, sample == first}, member);
        }
    }
  });
}

// Count, mean and sum of squared deviations of a set of numbers; sets are joined as by Chan et al. (1983). For p = 1 m2
// comes to hold the sum of |v|.
struct Moments {
  double count, mean, m2;

  void join(const Moments& other) {
    if (count == 0) {
      *this = other;
      return;
    }
    const double step = other.mean - mean, share = other.count / (count + other.count);
    mean = step - step == 0 ? mean + step * share : mean + other.mean;
    m2 += other.m2 + step * step * count * share;
    count += other.count;
  }
  double average() const { return m2 / count; }
};

// What is added to |sigma|^p: the mean of (c_p |v|)^p.
inline double spread(const Problem& p, const Moments& row) { return deviation_scale(p.p) * row.average(); }

// What a row's numbers are normalized with.
template <class A>
struct RowScale {
  A mean = 0, rstd = 1;
  // What the numerator is taken from.
  A offset(const Problem& p) const { return p.subtract_mean ? mean : 0; }
};

// From the moments of a row, or where no mean is subtracted the sum of its powers in m2.
template <class A>
RowScale<A> row_scale(const Problem& p, const Moments& row, double sigma) {
  RowScale<A> scale;
  if (p.summation.present) scale.mean = static_cast<A>(row.mean);
  if (p.suppression.present)
    scale.rstd = static_cast<A>(p.p == 1 ? InverseMeanDeviation<double>(sigma)(spread(p, row))
                                         : InverseDeviation<double>(sigma)(spread(p, row)));
  return scale;
}

template <class A>
void write_statistics(const Problem& p, const ForwardTensors& tensors, int64_t at, const RowScale<A>& scale,
                      const Moments& row) {
  if (tensors.mean != nullptr) static_cast<A*>(tensors.mean)[at] = scale.mean;
  if (tensors.rstd != nullptr) static_cast<A*>(tensors.rstd)[at] = scale.rstd;
  if (tensors.variance == nullptr) return;
  const double added = spread(p, row);
  static_cast<A*>(tensors.variance)[at] = static_cast<A>(p.p == 1 ? added * added : added);
}

// What a caller has made of the statistics of row `at`.
template <class A, class Tensors>
RowScale<A> given_scale(const Problem& p, const Tensors& tensors, int64_t at) {
  RowScale<A> scale;
  if (p.summation.present) scale.mean = static_cast<const A*>(tensors.mean)[at];
  if (p.suppression.present) scale.rstd = static_cast<const A*>(tensors.rstd)[at];
  return scale;
}

// Sums over a row of g = weight dy, of g times the numerator, of sign(v) and of what a threshold stops.
struct GradientSums {
  double g, gv, sign, stopped;
};

// dx = (g - slope v) rstd - shift, for p = 1 g rstd - slope sign(v) - shift, and what the row adds to the sum of
// P2 / s^(p + 1). With slope = P2 / s^2 / count no product overflows that dx does not, however small s is.
template <class A>
struct RowSlopes {
  A slope = 0, shift = 0;
  double for_sigma = 0;
};

template <class A>
RowSlopes<A> row_slopes(const Problem& p, const GradientSums& sums, double rstd, double l1_scale, double count) {
  RowSlopes<A> s;
  double slope = 0;
  if (p.suppression.present) {
    const double each = sums.gv * rstd * rstd;
    s.for_sigma = p.p == 1 ? each : each * rstd;
    slope = deviation_scale(p.p) * each / count;
    s.slope = static_cast<A>(slope);
  }
  if (p.summation.present) {  // the sum of v is zero here
    const double of_signs = l1_scale - (p.p == 1 ? slope : 0);
    s.shift =
        static_cast<A>(((p.subtract_mean ? sums.g * rstd : 0) + (of_signs == 0 ? 0 : of_signs * sums.sign)) / count);
  }
  return s;
}

template <class A>
void write_sums(const Problem& p, const BackwardTensors& tensors, int64_t at, const GradientSums& sums) {
  A* out = static_cast<A*>(tensors.sums) + at;
  const double found[] = {sums.g, sums.gv, sums.sign};
  for (int kind = 0; kind < 3; ++kind) out[kind * p.map_rows()] = static_cast<A>(found[kind]);
}

// What a caller has made of the sums of row `at`.
template <class A>
RowSlopes<A> given_slopes(const Problem& p, const BackwardTensors& tensors, int64_t at) {
  const A* given = static_cast<const A*>(tensors.slopes) + at;
  return {given[0], given[p.map_rows()]};
}

// The type of the values in an array of them.
template <class Array>
using value_of = std::remove_reference_t<decltype(std::declval<Array>()[0])>;

// Sums of several kinds, each in some chains of vectors of its own: one chain is as slow as an addition is long.
template <class A, int Kinds, int Chains>
class Sums {
 public:
  template <class V>
  void add(int kind, int chain, V v) {
    totals_.add(kind * Chains + chain, v);
  }
  A value(int kind) const {
    Vec<A> lanes = totals_.lanes[kind * Chains];
    A tail = totals_.tail[kind * Chains];
    for (int c = 1; c < Chains; ++c) {
      lanes += totals_.lanes[kind * Chains + c];
      tail += totals_.tail[kind * Chains + c];
    }
    return lane_sum<A>(lanes) + tail;
  }

 private:
  Totals<A, Kinds * Chains> totals_;
};

// for_lanes with the number of a chain: body(V{}, i, chain).
template <class V, int Chains, class Body>
inline void for_chains(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + Chains * kWidth<V> <= count; i += Chains * kWidth<V>)
    for (int c = 0; c < Chains; ++c) body(V{}, i + c * kWidth<V>, c);
  for_lanes<V>(count, [&](auto lane, int64_t j) { body(lane, j, 0); }, i);
}

}  // namespace divnorm::DIVNORM_ISA
