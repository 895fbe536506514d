// Tiles of half-precision attention in shared memory, and a block's walk over its keys.
#pragma once
#include "flash_half.cuh"
#include "kinds.cuh"

constexpr int kMostWarps = 4;

// Eight numbers from `from` on, rounded to T, those from `n` on zero.
template <class T, class From>
INLINE Words4 rounded8(const From* from, int n, float scale) {
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < n ? mul_rn(to_float(from[i]), scale) : 0.0f;
  return {{pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]), pack_pair<T>(x[4], x[5]),
           pack_pair<T>(x[6], x[7])}};
}

struct Vectors {
  const void* data;
  const float* scales;  // of a row, int8 only
  int32_t kind, size;   // elements of a vector
  int64_t stride;       // elements from a row to the next
};

// A tile of 64 vectors, row row_of(j) as vector j; zeros where that is negative, and past their
// size. kAsync: they are T already, in whole aligned words of 16 bytes, and the copy units do it.
template <class T, int kWidth, bool kAsync, class RowOf>
INLINE void load_tile(uint8_t* tile, const Vectors& from, RowOf row_of) {
  constexpr int kWords = kWidth / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < kBlockKeys * kWords; i += blockDim.x) {
    const int first = i % kWords * 8;
    const int64_t row = row_of(i / kWords), at = row * from.stride + first;
    const int n = row < 0 ? 0 : min(8, from.size - first);
    uint8_t* to = tile + word_offset<kWidth>(i / kWords, i % kWords);
    if (kAsync) {
      copy_async(to, static_cast<const T*>(from.data) + at, n > 0);
      continue;
    }
    Words4 words = {};
    if (n > 0) {
      if (from.kind == kF32)
        words = rounded8<T>(static_cast<const float*>(from.data) + at, n, 1.0f);
      else if (from.kind == kF16)
        words = rounded8<T>(static_cast<const half_t*>(from.data) + at, n, 1.0f);
      else if (from.kind == kBf16)
        words = rounded8<T>(static_cast<const bfloat_t*>(from.data) + at, n, 1.0f);
      else
        words = rounded8<T>(static_cast<const int8_t*>(from.data) + at, n, from.scales[row]);
    }
    *reinterpret_cast<Words4*>(to) = words;
  }
}

// The fragments of a warp's 16 queries, by way of a tile that is free again afterwards.
template <class T, int kWidth, class RowOf>
INLINE void load_queries(uint8_t* tile, const Vectors& from, RowOf row_of,
                         uint32_t (&q)[kWidth / 16][4]) {
  load_tile<T, kWidth, false>(tile, from, row_of);
  __syncthreads();
  const int matrix = threadIdx.x % 32 / 8;
  const int row = threadIdx.x / 32 * kWarpVectors + matrix % 2 * 8 + threadIdx.x % 8;
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step)
    load_matrices(q[step], tile + word_offset<kWidth>(row, 2 * step + matrix / 2));
  __syncthreads();
}

// Keys that a warp's vectors see: [low[h], high[h]) rows g and g + 8, [begin, end) any of them.
struct Sight {
  int32_t low[2], high[2], begin, end;
};

// `total` over the keys [begin, end), begin a multiple of 64. load(start, stage) brings the 64 keys
// from `start` on and their values into a stage, visit(state, start, stage) takes them from there;
// `memory` holds two stages.
template <int kStageBytes, class T, int kWidth, class Load, class Visit>
INLINE void walk(int32_t begin, int32_t end, uint8_t* memory, const Sight& sight,
                 HalfTotal<T, kWidth>& total, Load load, Visit visit) {
  HalfFlash<T, kWidth> state;
  state.clear();
  if (begin < end) {
    load(begin, memory);
    copy_async_commit();
  }
  for (int32_t start = begin, stage = 0; start < end; start += kBlockKeys, stage ^= 1) {
    const int32_t next = start + kBlockKeys;
    if (next < end) {
      load(next, memory + (stage ^ 1) * kStageBytes);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    if (start < sight.end && next > sight.begin) visit(state, start, memory + stage * kStageBytes);
    if (next % HalfPart::kChunkKeys == 0 || next >= end) {
      total.merge(state);
      state.clear();
    }
    __syncthreads();
  }
}
