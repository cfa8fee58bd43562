// The kernels of channel normalizations: y = n / D^beta with D = k + a * S, and its gradients (csrc/channels.h).
#pragma once

#include "channels_pool.h"
#include "channels_tile.h"

namespace divnorm::cuda {

__device__ inline bool learns(const ChannelScalars& scalars, int which) {
  return scalars.value[which] != scalars.value[which];
}

// k, a, beta and rho, those that learn from where they lie.
template <class A>
struct ChannelConstants {
  __device__ ChannelConstants(const ChannelScalars& scalars)
      : k(of(scalars, kScalarK)),
        a(of(scalars, kScalarA)),
        beta(of(scalars, kScalarBeta)),
        rho(of(scalars, kScalarRho)) {}
  static __device__ A of(const ChannelScalars& scalars, int which) {
    return learns(scalars, which) ? device::load(static_cast<const A*>(scalars.learned) + which)
                                  : static_cast<A>(scalars.value[which]);
  }
  A k, a, beta, rho;
};

// D^-beta.
template <class A>
__device__ A inverse_power(Power power, A beta, A divisor) {
  switch (power) {
    case Power::half: return device::inverse_root(divisor);
    case Power::three_quarters: {
      const A root = device::inverse_root(divisor);
      return root * std::sqrt(root);
    }
    case Power::one: return A(1) / divisor;
    default: return beta == A(0) ? A(1) : std::exp(-beta * std::log(divisor));
  }
}

// What a block works with: arrays of its tile, and in its shared memory, where these do not lie in front of them, what
// its threads exchange.
template <class A, bool Far, int Arrays>
struct ChannelMemory {
  __device__ ChannelMemory(const ChannelArguments& args) {
    const int64_t numbers = args.cut.numbers;
    A* const shared = reinterpret_cast<A*>(device::shared_memory());
    A* const far = static_cast<A*>(args.scratch) + args.cut.blocks * kScalars + device::block() * Arrays * numbers;
    A* const arrays = Far ? far : shared;
    for (int i = 0; i < Arrays; ++i) array[i].numbers = arrays + i * numbers;
    exchange = Far ? shared : shared + Arrays * numbers;
    carries = {exchange, args.cut.segments, args.cut.positions};
  }
  ChannelArray<A, Far> array[Arrays];
  A* exchange;
  ChannelCarries<A> carries;
};

template <class T, bool Far>
__global__ void __launch_bounds__(kChannelThreads, blocks_for(kChannelBlocks, sizeof(T)))
    channels_forward(const __grid_constant__ ChannelArguments args) {
  using A = Acc<T>;
  device::let_next_begin();
  const ChannelConstants<A> constant(args.scalars);
  const ChannelMemory<A, Far, kForwardArrays> memory(args);
  const auto &x = memory.array[0], &y = memory.array[1];  // y: sums first
  const ChannelWalk walk(args);
  for (int64_t index = device::block(); index < args.cut.tiles; index += args.cut.blocks) {
    const ChannelTile tile = channel_tile(args, index);
    copy_in<T>(tile, args.cut, args.x, x);
    device::sync_block();
    for_each_part(
        args, walk, args.window, tile.positions, constant.rho, memory.carries,
        [&](int c) {
          const A value = x.get(walk.at(c));
          return value * value;
        },
        [&](int c, A part, A) { y.set(walk.at(c), part); },
        [&](int c, A part, A) {
          const int at = walk.at(c);
          const A value = x.get(at), divisor = constant.k + constant.a * (y.get(at) + part);
          y.set(at, (args.squared ? value * value : value) * inverse_power(args.power, constant.beta, divisor));
        });
    device::sync_block();
    copy_out<T>(tile, args.cut, y, args.out);
  }
}

// With u = dy n / D^(beta + 1), and T its sums over the windows that see a channel, dx = dy n' / D^beta - 2 a beta x T.
template <class T, bool Far>
__global__ void __launch_bounds__(kChannelThreads, blocks_for(kChannelBlocks, sizeof(T)))
    channels_backward(const __grid_constant__ ChannelArguments args) {
  using A = Acc<T>;
  device::let_next_begin();
  const ChannelConstants<A> constant(args.scalars);
  const ChannelMemory<A, Far, kBackwardArrays> memory(args);
  const auto &x = memory.array[0], &dx = memory.array[1], &u = memory.array[2];  // dx: dy first; u: sums first
  const ChannelWalk walk(args);
  const bool logarithms = args.sums && learns(args.scalars, kScalarBeta);
  const bool second = args.out != nullptr || learns(args.scalars, kScalarRho);
  const ChannelWindow mirrored{args.window.exponential, args.window.after, args.window.before};
  const A slope = A(2) * constant.a * constant.beta;
  A of_k = 0, of_a = 0, of_beta = 0, of_rho = 0;
  for (int64_t index = device::block(); index < args.cut.tiles; index += args.cut.blocks) {
    const ChannelTile tile = channel_tile(args, index);
    copy_in<T>(tile, args.cut, args.x, x);
    copy_in<T>(tile, args.cut, args.dy, dx);
    device::sync_block();
    const auto square = [&](int c) {
      const A value = x.get(walk.at(c));
      return value * value;
    };
    for_each_part(
        args, walk, args.window, tile.positions, constant.rho, memory.carries, square,
        [&](int c, A part, A) { u.set(walk.at(c), part); },
        [&](int c, A part, A) {
          const int at = walk.at(c);
          const A value = x.get(at), sum = u.get(at) + part, divisor = constant.k + constant.a * sum;
          const A share = dx.get(at) * inverse_power(args.power, constant.beta, divisor);
          const A product = share * (args.squared ? value * value : value), of_divisor = product / divisor;
          u.set(at, of_divisor);
          dx.set(at, args.squared ? A(2) * value * share : share);
          of_k += of_divisor;
          of_a += of_divisor * sum;
          if (logarithms) of_beta += product * std::log(divisor);
        });
    device::sync_block();
    if (!second) continue;
    const auto subtract = [&](int c, A part, A derivative) {
      const int at = walk.at(c);
      const A value = x.get(at);
      dx.set(at, dx.get(at) - slope * value * part);
      of_rho += value * value * derivative;
    };
    for_each_part(
        args, walk, mirrored, tile.positions, constant.rho, memory.carries, [&](int c) { return u.get(walk.at(c)); },
        subtract, subtract);
    device::sync_block();
    if (args.out == nullptr) continue;
    copy_out<T>(tile, args.cut, dx, args.out);
    device::sync_block();
  }
  if (!args.sums) return;
  const A factor[kScalars] = {-constant.beta, -constant.beta, A(-1), -constant.beta * constant.a};
  const A all[kScalars] = {of_k, of_a, of_beta, of_rho};
#pragma unroll
  for (int i = 0; i < kScalars; ++i) {
    device::sync_block();  // the room is free
    const A sum = block_sum(all[i], memory.exchange);
    if (device::thread() != 0) continue;
    device::store(static_cast<A*>(args.scratch) + device::block() * kScalars + i,
                  learns(args.scalars, i) ? factor[i] * sum : A(0));
  }
}

template <class T>
ChannelKernels channel_kernels() {
  return {{channels_forward<T, false>, channels_forward<T, true>},
          {channels_backward<T, false>, channels_backward<T, true>}};
}

}  // namespace divnorm::cuda
