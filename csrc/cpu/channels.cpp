// Channel normalization: tiles of positions with all of their channels, which are read once and written once.
#include <deque>

#include "channel_lines.h"
#include "channel_tiles.h"
#include "entries.h"

namespace divnorm::DIVNORM_ISA {

namespace {

// run(thread, tile) for all of them.
template <class A, class Run>
void for_tiles(const ChannelPlan<A>& plan, Threads& team, bool streams, Run&& run) {
  team.run([&](Member member) {
    const int64_t begin = member.team * plan.tiles / member.teams, end = (member.team + 1) * plan.tiles / member.teams;
    for (int64_t i = begin; i < end; ++i) run(member.thread, i);
    if (streams) stream_fence();
  });
}

template <class T>
bool bypasses(const ChannelProblem& problem, const ChannelPlan<Acc<T>>& plan, const void* out) {
  return problem.numel() * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
         Tiles<T>::may_stream(plan, static_cast<const T*>(out));
}

// Whether vectors in a row from here on may go past the cache.
template <class T>
bool aligned(const T* out) {
  return std::is_same_v<T, Acc<T>> && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
}

int threads_for(const ChannelProblem& problem, int threads) {
  return static_cast<int>(smaller(threads, divide_up(problem.numel(), kThreadGrain)));
}

template <class T>
void forward_of(const ChannelProblem& problem, const ChannelForward& call, int threads) {
  using A = Acc<T>;
  const ChannelPlan<A> plan(problem);
  const Numbers<A> numbers(call.scalars);
  const bool streams = bypasses<T>(problem, plan, call.y);
  const T* x = static_cast<const T*>(call.x);
  T* y = static_cast<T*>(call.y);
  Threads team(threads_for(problem, threads), plan.tiles, false);
  if (slides<T>(problem)) {
    std::deque<ForwardLines<T>> lines;
    for (int i = 0; i < team.count(); ++i) lines.emplace_back(problem, numbers, streams && aligned(y));
    return with_form<T>(numbers.exponents.kind(), problem.squared, [&](auto form) {
      for_tiles(plan, team, streams, [&](int thread, int64_t i) {
        const ChannelTile tile = plan.tile(i);
        lines[thread].run(form, tile.count, x + tile.offset, y + tile.offset);
      });
    });
  }
  std::deque<Tiles<T>> tiles;
  std::deque<ForwardPass<A>> passes;
  for (int i = 0; i < team.count(); ++i) {
    tiles.emplace_back(plan, false, streams);
    passes.emplace_back(problem, numbers);
  }
  with_form<T>(numbers.exponents.kind(), problem.squared, [&](auto form) {
    for_tiles(plan, team, streams,
              [&](int thread, int64_t i) { tiles[thread].run(form, passes[thread], plan.tile(i), x, nullptr, y); });
  });
}

// Sums of a tile stand by themselves until all are there: how many threads there were does not show.
template <class T>
void backward_of(const ChannelProblem& problem, const ChannelBackward& call, int threads) {
  using A = Acc<T>;
  const ChannelPlan<A> plan(problem);
  const Numbers<A> numbers(call.scalars);
  const bool streams = call.dx != nullptr && bypasses<T>(problem, plan, call.dx), learns = call.dlearned != nullptr;
  const T *x = static_cast<const T*>(call.x), *dy = static_cast<const T*>(call.dy);
  T* dx = static_cast<T*>(call.dx);
  Threads team(threads_for(problem, threads), plan.tiles, false);
  const Buffer<ScalarSums> sums(learns ? plan.tiles : 0);
  const auto form = [&](auto&& body) { with_form<T>(numbers.exponents.kind(), problem.squared, body); };
  if (slides<T>(problem)) {
    std::deque<BackwardLines<T>> lines;
    for (int i = 0; i < team.count(); ++i) lines.emplace_back(problem, numbers, call, streams && aligned(dx));
    form([&](auto form) {
      for_tiles(plan, team, streams, [&](int thread, int64_t i) {
        const ChannelTile tile = plan.tile(i);
        lines[thread].run(form, tile.count, x + tile.offset, dy + tile.offset, dx == nullptr ? dx : dx + tile.offset);
        if (learns) sums.data()[i] = lines[thread].take_sums();
      });
    });
  } else {
    std::deque<Tiles<T>> tiles;
    std::deque<BackwardPass<A>> passes;
    for (int i = 0; i < team.count(); ++i) {
      tiles.emplace_back(plan, true, streams);
      passes.emplace_back(problem, numbers, call);
    }
    form([&](auto form) {
      for_tiles(plan, team, streams, [&](int thread, int64_t i) {
        tiles[thread].run(form, passes[thread], plan.tile(i), x, dy, dx);
        if (learns) sums.data()[i] = passes[thread].take_sums();
      });
    });
  }
  if (!learns) return;
  ScalarSums all{};
  for (int64_t tile = 0; tile < plan.tiles; ++tile)
    for (int i = 0; i < kScalars; ++i) all[i] += sums.data()[tile][i];
  const double beta = numbers.exponents.beta(), factors[kScalars] = {-beta, -beta, -1, -beta * numbers.a};
  for (int i = 0; i < kScalars; ++i) {
    const bool learned = call.scalars.learns(static_cast<Scalar>(i));
    static_cast<A*>(call.dlearned)[i] = learned ? static_cast<A>(factors[i] * all[i]) : A(0);
  }
}

}  // namespace

void channels_forward(const ChannelProblem& problem, const ChannelForward& call, int threads) {
  switch (problem.dtype) {
    case Dtype::float64: return forward_of<double>(problem, call, threads);
    case Dtype::float32: return forward_of<float>(problem, call, threads);
    case Dtype::bfloat16: return forward_of<BFloat16>(problem, call, threads);
    case Dtype::float16: return forward_of<Float16>(problem, call, threads);
  }
}

void channels_backward(const ChannelProblem& problem, const ChannelBackward& call, int threads) {
  switch (problem.dtype) {
    case Dtype::float64: return backward_of<double>(problem, call, threads);
    case Dtype::float32: return backward_of<float>(problem, call, threads);
    case Dtype::bfloat16: return backward_of<BFloat16>(problem, call, threads);
    case Dtype::float16: return backward_of<Float16>(problem, call, threads);
  }
}

}  // namespace divnorm::DIVNORM_ISA
