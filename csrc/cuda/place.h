// Where a block of a cluster stands.
#pragma once

#include "tile.h"

namespace divnorm::cuda {

// Which part of which rows a block holds.
struct Place {
  __device__ explicit Place(const Arguments& args) {
    const Resident& r = args.resident;
    const int64_t cluster = device::block() / r.blocks;
    rank = static_cast<int>(device::block() % r.blocks);
    group = static_cast<int>(cluster / r.parts);
    part = static_cast<int>(cluster % r.parts);
    channel_slice = rank % r.channel_blocks;
    position_slice = rank / r.channel_blocks;
    owned_begin = clamped(rank * r.owned, 0, args.shape.positions);
    owned_end = clamped(owned_begin + r.owned, 0, args.shape.positions);
  }
  __device__ Tile tile(const Arguments& args, int64_t sample) const {
    const Resident& r = args.resident;
    return tile_at(args.shape, sample, group, channel_slice * r.tile_channels, r.tile_channels,
                   position_slice * r.tile_positions, r.tile_positions);
  }
  __device__ int64_t slot(const Resident& r) const {
    return (static_cast<int64_t>(group) * r.parts + part) * r.blocks + rank;
  }
  int rank, group, part, channel_slice, position_slice, owned_begin, owned_end;
};

}  // namespace divnorm::cuda
