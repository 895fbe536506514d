// Ternary weights into the device's layout (ternary.cuh) and out of it.
#include "ternary.cuh"

// Where word i of a lane has field j of byte b.
struct Place {
  int32_t output, k;
};

INLINE Place place_of(int64_t word, int32_t blocks, int b, int j) {
  const int i = int(word & 3), lane = int(word >> 2 & 31), tile = int(word >> 7 & 3);
  const int64_t rest = word >> 9;
  const int32_t block = int32_t(rest % blocks), panel = int32_t(rest / blocks);
  return {kPanel * panel + kTile * tile + lane / 4 + 8 * (i & 1),
          kBlockK * block + 32 * (lane % 4) + 8 * j + 4 * (i >> 1) + b};
}

// Row of the matrix that stands at output o. Gated: gate rows and up rows, n / 2 each, side by side
// in tiles, 8 of either, so that one thread holds a gate and its up.
INLINE int32_t row_of(int32_t o, int32_t n, bool gated) {
  if (!gated) return o;
  const int32_t pair = o / kTile * 8 + o % 8, half = n / 2;
  return pair >= half ? n : o % kTile < 8 ? pair : half + pair;
}

// A thread makes one word.
__global__ void pack(uint32_t* words,                    // [total]
                     const int8_t* __restrict__ matrix,  // [n][k] of -1, 0, 1
                     int32_t n, int32_t k, int32_t blocks, int64_t total, int32_t gated) {
  const int64_t w = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (w >= total) return;
  uint32_t word = 0;
  for (int b = 0; b < 4; ++b)
    for (int j = 0; j < kSteps; ++j) {
      const Place at = place_of(w, blocks, b, j);
      const int32_t row = row_of(at.output, n, gated);
      const bool inside = row < n && at.k < k;
      const int code = inside ? matrix[int64_t(row) * k + at.k] + 1 : 1;
      word |= uint32_t(code) << (8 * b + 2 * j);
    }
  words[w] = word;
}

__global__ void unpack(int8_t* matrix, const uint32_t* __restrict__ words, int32_t n, int32_t k,
                       int32_t blocks, int64_t total, int32_t gated) {
  const int64_t w = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (w >= total) return;
  for (int b = 0; b < 4; ++b)
    for (int j = 0; j < kSteps; ++j) {
      const Place at = place_of(w, blocks, b, j);
      const int32_t row = row_of(at.output, n, gated);
      if (row < n && at.k < k)
        matrix[int64_t(row) * k + at.k] = int8_t((words[w] >> (8 * b + 2 * j) & 3) - 1);
    }
}
