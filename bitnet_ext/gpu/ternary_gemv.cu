// Products of few tokens: y[m][o] = sum_k q[m][k] w[o][k], limited by the bytes of w.
//
// A block of 8 warps takes kTiles tiles of 16 outputs and splits k among 8 / kTiles warps each; a
// warp keeps kFlight loads of 512 bytes of weights in flight, and multiplies them with 8 or 16
// tokens by matrix instructions, whose idle columns cost nothing. Partial sums are integers, so the
// order in which they meet does not matter.
#include "epilogue.cuh"
#include "ternary.cuh"

constexpr int kWarps = 8, kFlight = 4;

// Fragments of 8 tokens, of a block of k: the lane's 32 bytes of its token.
struct Columns {
  Words4 half[2];
};

// acc[j] += 4^j codes of field j times the tokens.
INLINE void multiply(int32_t (&acc)[kSteps][4], const Words4& words, const Columns& x) {
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    uint32_t a[4];
    scaled_codes(words, j, a);
    const uint32_t b[2] = {x.half[j / 2].x[j % 2 * 2], x.half[j / 2].x[j % 2 * 2 + 1]};
    mma_u8_s8(acc[j], a, b);
  }
}

// grid (tiles / kTiles, tokens / 8 kGroups). Overflow: |acc[3]| <= 2 * 64 * 128 * k / 4 over a
// warp's part of k, 2^28 for a quarter of k = 2^18.
template <int kGroups, int kTiles>
__global__ void __launch_bounds__(32 * kWarps)
    ternary_gemv(const uint32_t* __restrict__ words,  // ternary.cuh
                 const int8_t* __restrict__ q,        // [rows][128 blocks]
                 int32_t blocks, EPILOGUE_PARAMETERS) {
  constexpr int kSlices = kWarps / kTiles, kTokens = 8 * kGroups;
  __shared__ int32_t partial[kSlices][kTiles][kTokens][kTile];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int own = warp % kTiles, slice = warp / kTiles;
  const int32_t tile = blockIdx.x * kTiles + own, first = blockIdx.y * kTokens;
  const int64_t row_bytes = int64_t(blocks) * kBlockK;
  // A column past the tokens repeats the last; its sums are not stored.
  const int8_t* token[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i)
    token[i] = q + min(first + 8 * i + g, rows - 1) * row_bytes + 32 * t;

  const auto load = [&](Words4& w, int32_t block) {
    if (block < blocks) w = load_streaming(tile_words(words, blocks, tile, block));
  };
  Words4 ring[kFlight];
#pragma unroll
  for (int i = 0; i < kFlight; ++i) load(ring[i], slice + i * kSlices);
  int32_t acc[kGroups][kSteps][4] = {};
  for (int32_t first_block = slice; first_block < blocks; first_block += kFlight * kSlices) {
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int32_t block = first_block + i * kSlices;
      if (block >= blocks) break;
      const Words4 w = ring[i];
      load(ring[i], block + kFlight * kSlices);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const Words4* x = reinterpret_cast<const Words4*>(token[group] + block * kBlockK);
        multiply(acc[group], w, {x[0], x[1]});
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kGroups; ++i)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const auto& a = acc[i];
      partial[slice][own][8 * i + 2 * t + r % 2][g + r / 2 * 8] =
          a[0][r] + (a[1][r] >> 2) + (a[2][r] >> 4) + (a[3][r] >> 6);
    }
  __syncthreads();

  const Epilogue epilogue = EPILOGUE_ARGUMENTS;
  for (int i = threadIdx.x; i < kTiles * kTokens * 8; i += 32 * kWarps) {
    const int low = i % 8, at = i / 8 % kTiles, m = i / 8 / kTiles;
    if (first + m >= rows) break;
    int32_t sum[2] = {};
#pragma unroll
    for (int k = 0; k < kSlices; ++k) {
      sum[0] += partial[k][at][m][low];
      sum[1] += partial[k][at][m][low + 8];
    }
    epilogue.finish(sum[0], sum[1], first + m, (blockIdx.x * kTiles + at) * kTile + low);
  }
}
