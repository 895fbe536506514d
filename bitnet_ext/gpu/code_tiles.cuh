// Vectors of int8 codes in shared memory, and their dot products on the matrix units.
#pragma once
#include "mma.cuh"

// Byte where a 16-byte word of row `row` of a tile [rows][kWidth] stands: the 8 rows of a matrix
// lie in different banks.
template <int kWidth>
INLINE int code_offset(int row, int word) {
  return row * kWidth + ((word ^ (kWidth == 128 ? row & 7 : row >> 1 & 3)) << 4);
}

// A tile [rows][kWidth]: row_of(j) is where row j's first code stands, negative for zeros; zeros
// past n codes, too.
template <int kWidth, class RowOf>
INLINE void load_codes(uint8_t* tile, const int8_t* from, int rows, int n, RowOf row_of) {
  constexpr int kWords = kWidth / 16;
  for (int i = threadIdx.x; i < rows * kWords; i += blockDim.x) {
    const int64_t row = row_of(i / kWords);
    const int byte = i % kWords * 16;
    Words4 words = {};
    if (row >= 0 && byte < n) words = *reinterpret_cast<const Words4*>(from + row + byte);
    *reinterpret_cast<Words4*>(tile + code_offset<kWidth>(i / kWords, i % kWords)) = words;
  }
}

// Dot products of kRows vectors and 16 keys a warp: exact, |sum| <= 127^2 n.
template <int kRows, int kWidth>
struct CodeDots {
  static constexpr int kTiles = (kRows + 15) / 16;
  int32_t sums[kTiles][2][4] = {};  // of tiles of 16 vectors by 8 keys

  // Over the first n codes of tiles [16 kTiles][kWidth] and [16 warps][kWidth].
  INLINE void add(const uint8_t* vectors, const uint8_t* keys, int n) {
    const int warp = threadIdx.x / 32, matrix = threadIdx.x % 32 / 8, row = threadIdx.x % 8;
#pragma unroll 1
    for (int step = 0; 32 * step < n; ++step) {
      uint32_t k[4];
      load_matrices(
          k, keys + code_offset<kWidth>(16 * warp + 8 * (matrix / 2) + row, 2 * step + matrix % 2));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint32_t v[4];
        load_matrices(v, vectors + code_offset<kWidth>(16 * i + 8 * (matrix % 2) + row,
                                                       2 * step + matrix / 2));
        mma_s8(sums[i][0], v, {k[0], k[1]});
        mma_s8(sums[i][1], v, {k[2], k[3]});
      }
    }
  }

  // to[vector * pitch + key]
  INLINE void store(float* to, int pitch) const {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int vector = 16 * i + g + e / 2 % 2 * 8, key = 16 * warp + e / 4 * 8 + 2 * t + e % 2;
        if (vector < kRows) to[vector * pitch + key] = to_float(sums[i][e / 4][e % 4]);
      }
  }
};
