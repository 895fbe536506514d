// A product's tiles and their blocks of k, shared out evenly to the blocks of a grid (stream-K:
// Osama et al., arXiv:2301.03598).
//
// Units are (tile, block of k), tile after tile; of U units block b of G takes [U b / G, U (b + 1)
// / G), G <= U. Where several blocks have units of a tile, each leaves its sums in memory, and the
// last to do so adds them up and finishes the tile: nobody waits. Sums are integers, so that it
// does not matter who comes last.
#pragma once
#include "ptx.cuh"

// A block's units of one tile: blocks of k [first, last).
struct Piece {
  int32_t tile, first, last;
  int32_t leader, sharers;  // the blocks that have units of the tile
};

struct Share {
  int32_t units, at, end, each;  // `each`: units of a tile; fewer than 2^31 in all

  // A tile without k has a unit too.
  INLINE void begin(int32_t tiles, int32_t blocks) {
    each = max(blocks, 1);
    units = tiles * each;
    at = int32_t(int64_t(units) * blockIdx.x / gridDim.x);
    end = int32_t(int64_t(units) * (blockIdx.x + 1) / gridDim.x);
  }
  INLINE int32_t owner(int64_t unit) const { return int32_t(((unit + 1) * gridDim.x - 1) / units); }
  INLINE bool next(Piece& piece) {
    if (at >= end) return false;
    piece.tile = at / each;
    piece.first = at % each;
    piece.last = min(each, piece.first + end - at);
    piece.leader = owner(piece.tile * each);
    piece.sharers = owner(piece.tile * each + each - 1) - piece.leader + 1;
    at += piece.last - piece.first;
    return true;
  }
};

struct SplitRoom {
  int32_t* sums;     // [2 G][kRows kSums][kThreads]
  int32_t* tickets;  // [G], zero between launches
};

// Whether this block finishes the tile, with the sums of all. sync() is a barrier of its kThreads
// threads.
template <int kThreads, int kRows, int kSums, class Sync>
INLINE bool gather(int32_t (&sum)[kRows][kSums], const SplitRoom& room, const Piece& piece,
                   Sync sync) {
  if (piece.sharers == 1) return true;
  __shared__ bool last;
  // A block may have the end of one shared tile and the beginning of another, which it leads.
  const auto slot_of = [&](int32_t block) {
    const int64_t slot = 2 * int64_t(block) + (block == piece.leader);
    return room.sums + slot * (kRows * kSums * kThreads) + threadIdx.x;
  };
  int32_t* own = slot_of(blockIdx.x);
#pragma unroll
  for (int i = 0; i < kRows * kSums; ++i) own[i * kThreads] = sum[i / kSums][i % kSums];
  sync();
  if (threadIdx.x == 0) {
    int32_t* ticket = room.tickets + piece.leader;
    __threadfence();
    last = atomicAdd(ticket, 1) == piece.sharers - 1;
    if (last) *ticket = 0;
    __threadfence();
  }
  sync();
  if (!last) return false;
  for (int32_t block = piece.leader; block < piece.leader + piece.sharers; ++block) {
    if (block == int32_t(blockIdx.x)) continue;
    const int32_t* other = slot_of(block);
#pragma unroll
    for (int i = 0; i < kRows * kSums; ++i) sum[i / kSums][i % kSums] += other[i * kThreads];
  }
  return true;
}
