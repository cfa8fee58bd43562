// Where a thread stands among those that share contiguous channels which come chunk by chunk. Threads take numbers side
// by side together, as they lie in a chunk: where the positions of a channel are no multiple of these, some go from one
// channel into the next, in a pattern that repeats after a period of a few channels. A thread keeps to one place of the
// pattern, and so to the same positions, and to a slice of the block's periods.
#pragma once

#include "ring.h"

namespace divnorm::cuda {

// Channels of numbers side by side, the first `split` of which are of the first one.
struct TwoChannels {
  int first, second, split;
};

// A parameter as such numbers see it.
template <class A>
class OfTwoChannels {
 public:
  static constexpr bool kPerPosition = false;
  __device__ OfTwoChannels(const A* numbers, const TwoChannels& channels)
      : first_(numbers[channels.first]), second_(numbers[channels.second]), split_(channels.split) {}
  template <int Count>
  __device__ Pack<A, Count> at(int) const {
    Pack<A, Count> pack;
    for (int i = 0; i < Count; ++i) pack.at[i] = i < split_ ? first_ : second_;
    return pack;
  }

 private:
  A first_, second_;
  int split_;
};

// V numbers of a place. Crosses: they may go into a second channel; else `split` is more than them.
template <int V, bool Crosses>
struct PlaceInPeriod {
  static constexpr int kCount = V;

  int slice;              // of the periods
  int at;                 // from the start of a period
  int channel, position;  // of the first one, in it
  int split;              // positions up to the end of the channel

  template <class A, bool PerPosition>
  using Parameter = std::conditional_t<Crosses, OfTwoChannels<A>, OfChannel<A, PerPosition>>;
  // Of a period whose first channel is `of`.
  __device__ auto channels(int of) const {
    if constexpr (Crosses)
      return TwoChannels{of + channel, of + channel + (split < V ? 1 : 0), split};
    else
      return of;
  }
  // Of a map at the block's own positions.
  template <class A>
  __device__ Pack<A, V> read(const A* map) const {
    if constexpr (Crosses) {
      Pack<A, V> pack;
      for (int v = 0; v < V; ++v) pack.at[v] = map[v < split ? position + v : v - split];
      return pack;
    } else {
      return read_pack<V>(map + position);
    }
  }
  // As partial statistics of the pieces of a slice, one for each channel of the period; partial: (pieces, pitch).
  template <class A>
  __device__ void write(A* partial, int pieces, int pitch, const Pack<A, V>& pack) const {
    A* const to = partial + (slice * pieces + channel) * pitch;
    if constexpr (Crosses) {
      for (int v = 0; v < V; ++v) to[v < split ? position + v : pitch + v - split] = pack.at[v];
    } else {
      write_pack(to + position, pack);
    }
  }
};

template <class V>
struct Type {
  using type = V;
};

// Bytes: of the numbers that a thread takes together.
template <class T, int Bytes>
class PlaneColumn {
 public:
  static constexpr int kMost = Bytes < static_cast<int>(sizeof(T)) ? 1 : Bytes / sizeof(T);
  static constexpr int kHalf = kMost > 1 ? kMost / 2 : 1;

  template <class Team>
  __device__ PlaneColumn(const Arguments& args, const Portion& portion, const Team& team)
      : of_(args.pipeline), slices_(args.resident.slices), positions_(portion.positions), channel_(portion.channel) {
    const int vectors = (positions_ << of_.period) / of_.vector;
    slice_ = team.index() / vectors;
    at_ = (team.index() - slice_ * vectors) * of_.vector;
    of_channel_ = at_ / positions_;
  }

  // Calls body(place) by every thread that there is something for.
  template <class Body>
  __device__ void with_place(Body&& body) const {
    if (slice_ >= slices_.count) return;
    const int position = at_ - of_channel_ * positions_, split = positions_ - position;
    if (of_.period > 0)
      body(PlaceInPeriod<kMost, true>{slice_, at_, of_channel_, position, split});
    else if (of_.vector == kMost)
      body(PlaceInPeriod<kMost, false>{slice_, at_, 0, position, split});
    else if (of_.vector == kHalf)
      body(PlaceInPeriod<kHalf, false>{slice_, at_, 0, position, split});
    else
      body(PlaceInPeriod<1, false>{slice_, at_, 0, position, split});
  }
  // Calls body(Parameter as the type of a constant, at, channels, position, mean, rstd) for the numbers of this
  // thread's place in each period of a chunk: where they lie there and of which channels they are, as channel_sums.h
  // and planes.h take it.
  template <class A, class Body>
  __device__ void for_each(const Tile& chunk, const Local<A>& local, const Affine<T>& affine, Body&& body) const {
    with_place([&](auto place) {
      with_parameters(affine, [&](auto per_position) {
        using Parameter = typename decltype(place)::template Parameter<A, decltype(per_position)::value>;
        const auto mean = place.read(local.mean), rstd = place.read(local.rstd);
        const int end = periods(chunk);
#pragma unroll 2
        for (int i = first(chunk); i < end; i += slices_.count)
          body(Type<Parameter>(), i * period_numbers() + place.at, place.channels(i * period_channels()),
               place.position, mean, rstd);
      });
    });
  }
  // The first of the slice's periods in a chunk, and how many it has there: one after the other, slices().count apart.
  __device__ int first(const Tile& chunk) const {
    const int behind = (chunk.channel - channel_ >> of_.period) + slices_.count - 1 - slice_;
    return slices_.count - 1 - (behind - quotient(slices_.by_count, behind) * slices_.count);
  }
  __device__ int count(const Tile& chunk, int first) const { return slice_channels(periods(chunk), first, slices_); }
  __device__ int periods(const Tile& chunk) const { return chunk.channels >> of_.period; }
  __device__ const Slices& slices() const { return slices_; }
  __device__ int period_channels() const { return 1 << of_.period; }
  __device__ int period_numbers() const { return positions_ << of_.period; }
  __device__ int pieces() const { return slices_.count << of_.period; }

 private:
  const Pipeline& of_;
  const Slices& slices_;
  int positions_, channel_, slice_, at_, of_channel_;
};

}  // namespace divnorm::cuda
