// Sums over windows of channels: additions alone, of about as many numbers for any window.
#pragma once

#include "channels_program.h"
#include "device.h"

namespace divnorm::cuda {

// What a thread works on: every segment_step-th segment of the channels at a position.
struct ChannelWalk {
  __device__ ChannelWalk(const ChannelArguments& args)
      : position(device::thread() % args.cut.positions),
        first_segment(device::thread() / args.cut.positions),
        segment_step(device::threads() / args.cut.positions),
        step(args.cut.step) {
    const int inner = args.cut.stretches > 0 ? args.cut.positions : static_cast<int>(args.inner);
    start = position / inner * args.cut.pitch + position % inner;
    if (first_segment >= segment_step) first_segment = args.cut.segments;  // a thread too many
  }
  __device__ int at(int channel) const { return start + channel * step; }

  int position, first_segment, segment_step;
  int start, step;  // in an array
};

// body(segment, its first channel, their end) for those of a thread.
template <class Body>
__device__ void for_each_segment(const ChannelArguments& args, const ChannelWalk& walk, int positions, Body&& body) {
  if (walk.position >= positions) return;
  for (int s = walk.first_segment; s < args.cut.segments; s += walk.segment_step) {
    const int begin = s * args.cut.segment, end = begin + args.cut.segment;
    body(s, begin, end < args.channels ? end : args.channels);
  }
}

// Of a segment no longer than the window, which begins with channel `begin`: the last channel that its window sees is
// seen by all others. Theirs are sums from there down, and from there up.
template <class A, class Number, class First, class Rest>
__device__ void box_parts(const ChannelArguments& args, const ChannelWindow& window, int begin, int end,
                          Number&& number, First&& first, Rest&& rest) {
  const int last = begin + window.after < args.channels ? begin + window.after : args.channels - 1;
  A sum = 0;
  for (int c = last; c >= 0 && c > end - 1 - window.before; --c) sum += number(c);
  for (int c = end - 1; c >= begin; --c) {
    if (c >= window.before) sum += number(c - window.before);
    first(c, sum, A(0));
  }
  sum = 0;
  for (int c = begin; c < end; ++c) {
    if (c > begin && c + window.after < args.channels) sum += number(c + window.after);
    rest(c, sum, A(0));
  }
}

// A sum whose weights decay with the distance by rho, and its derivative by rho.
template <class A>
struct Decaying {
  A sum = 0, slope = 0;

  __device__ void step(A rho, A number) {
    slope = sum + rho * slope;
    sum = number + rho * sum;
  }
  // Behind it `next`, of as many channels as `power` decays over.
  __device__ void append(const Decaying& power, const Decaying& next) {
    slope = next.slope + power.sum * slope + power.slope * sum;
    sum = next.sum + power.sum * sum;
  }
};

// rho^exponent and its derivative, without a division by rho.
template <class A>
__device__ Decaying<A> power_of(A rho, int exponent) {
  Decaying<A> power{A(1), A(0)}, square{rho, A(1)};
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) power = {power.sum * square.sum, power.sum * square.slope + power.slope * square.sum};
    square = {square.sum * square.sum, A(2) * square.sum * square.slope};
  }
  return power;
}

// What the segments of a tile leave for the others: [up, down][sum, slope][segment][position].
template <class A>
struct ChannelCarries {
  A* numbers;
  int segments, positions;

  __device__ A& at(bool down, bool slope, int segment, int position) const {
    return numbers[((2 * down + slope) * segments + segment) * positions + position];
  }
  __device__ void set(bool down, int segment, int position, const Decaying<A>& value) const {
    at(down, false, segment, position) = value.sum;
    at(down, true, segment, position) = value.slope;
  }
  __device__ Decaying<A> get(bool down, int segment, int position) const {
    return {at(down, false, segment, position), at(down, true, segment, position)};
  }
};

// Two parts of the sum over each window, of number(c) for the channels c that it sees, with their derivatives by rho:
// first(c, part, derivative) for all channels of a segment from the last one down, then rest(c, part, derivative) from
// the first one up. All threads come here; what others have made of the numbers is there.
template <class A, class Number, class First, class Rest>
__device__ void for_each_part(const ChannelArguments& args, const ChannelWalk& walk, const ChannelWindow& window,
                              int positions, A rho, const ChannelCarries<A>& carries, Number&& number, First&& first,
                              Rest&& rest) {
  if (!window.exponential) {
    for_each_segment(args, walk, positions,
                     [&](int, int begin, int end) { box_parts<A>(args, window, begin, end, number, first, rest); });
    return;
  }
  const int segments = args.cut.segments;
  if (segments > 1) {
    for_each_segment(args, walk, positions, [&](int segment, int begin, int end) {
      Decaying<A> up, down;
      for (int c = begin; c < end; ++c) up.step(rho, number(c));
      for (int c = end - 1; c >= begin; --c) down.step(rho, number(c));
      carries.set(false, segment, walk.position, up);
      carries.set(true, segment, walk.position, down);
    });
    device::sync_block();
  }
  const Decaying<A> power = power_of(rho, args.cut.segment);
  for_each_segment(args, walk, positions, [&](int segment, int begin, int end) {
    Decaying<A> up, down;
    for (int s = 0; s < segment; ++s) up.append(power, carries.get(false, s, walk.position));
    for (int s = segments - 1; s > segment; --s) down.append(power, carries.get(true, s, walk.position));
    for (int c = end - 1; c >= begin; --c) {
      const A beyond = rho * down.sum;
      down.step(rho, number(c));
      first(c, beyond, down.slope);
    }
    for (int c = begin; c < end; ++c) {
      up.step(rho, number(c));
      rest(c, up.sum, up.slope);
    }
  });
}

}  // namespace divnorm::cuda
