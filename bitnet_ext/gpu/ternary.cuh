// Ternary weights on a device: one layout from which every product reads, in fragments of m16n8k32
// (mma.cuh). The instruction's 16 rows are outputs, its 8 columns tokens.
//
// Stored are codes c = w + 1 in {0, 1, 2}, the unsigned operand of u8 x s8 products:
//   sum_k q w = sum_k q c - sum_k q
//
//   words[panel][block][tile][lane][4]    uint32; outputs and k padded with code 1
//     panel  64 outputs             tile  16 of them
//     block  128 k, 2048 bytes      lane  4 g + t
//   word i, bits 8 b + 2 j, 8 b + 2 j + 1 (b, j = 0..3):
//     output 64 panel + 16 tile + g + 8 (i & 1),   k = 128 block + 32 t + 8 j + 4 (i >> 1) + b
//
// So field j of the four words is the A fragment of step j, and the lane's 32 bytes of a token from
// 128 block + 32 t on hold its B fragments: words 2 j and 2 j + 1. Which k an instruction sums is
// free, as long as A and B agree.
//
// Field j of a word, left where it is, is c * 4^j: a product of such words is 4^j times what it
// should be, and is divided at the end of a sum rather than shifting every word.
#pragma once
#include "mma.cuh"

constexpr int kPanel = 64;    // outputs
constexpr int kBlockK = 128;  // k of a block
constexpr int kTile = 16;     // outputs of a tile
constexpr int kSteps = 4;     // fragments of a block

// Words of one lane of one tile.
INLINE const Words4* tile_words(const uint32_t* words, int32_t blocks, int32_t tile,
                                int32_t block) {
  const int64_t at = (int64_t(tile >> 2) * blocks + block) * 4 + (tile & 3);
  return reinterpret_cast<const Words4*>(words) + at * 32 + threadIdx.x % 32;
}

// Field j of each word, times 4^j.
INLINE void scaled_codes(const Words4& words, int j, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = words.x[i] & (0x03030303u << 2 * j);
}

// Field j of each word.
INLINE void codes(const Words4& words, int j, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = words.x[i] >> 2 * j & 0x03030303u;
}
