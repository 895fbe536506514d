// Products of many tokens on the matrix units of a warp: y[m][o] = sum_k q[m][k] w[o][k].
//
// A block of 4 warps takes 128 outputs x 64 tokens, a warp 32 x 64 of them: 64 sums a thread, and a
// decoded weight serves 64 tokens. Three blocks fit a multiprocessor. Weights go from global memory
// to registers in the order of their fragments, half a block of k ahead; tokens go through kStages
// stages of shared memory by asynchronous copies.
//
//   a stage   [64 tokens][128 bytes of k], 16-byte chunk c at c ^ (token % 8): a quarter warp reads
//             chunks 2 t + i of two neighbouring tokens, which lie in all 32 banks
//   at the end the same memory takes 32 tokens' sums, int32 [32][128 + 4], for the epilogue
#include "epilogue.cuh"
#include "ternary.cuh"

constexpr int kOutputs = 128, kTokens = 64, kThreads = 128, kStages = 4;
constexpr int kStageBytes = kTokens * kBlockK;
constexpr int kTiles = 2, kGroups = 8;  // of a warp: 16 outputs, 8 tokens
constexpr int kPartTokens = 32;

using Sums = int32_t[kTiles][kGroups][4];

// One block of k for a warp. load_next(words) comes as soon as the words are all decoded, half of
// the products before they are needed again.
template <class LoadNext>
INLINE void multiply(Sums& acc, Words4 (&words)[kTiles], const uint8_t* stage, LoadNext load_next) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t a[2][kTiles][4];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) codes(words[tile], 2 * pair + j, a[j][tile]);
    if (pair == 1) load_next(words);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const uint8_t* token = stage + (8 * group + g) * kBlockK;
      const Words4 x = *reinterpret_cast<const Words4*>(token + 16 * ((2 * t + pair) ^ g));
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint32_t b[2] = {x.x[2 * j], x.x[2 * j + 1]};
          mma_u8_s8(acc[tile][group], a[j][tile], b);
        }
    }
  }
}

// The sums of all warps, by parts of the tokens, through shared memory to the epilogue.
INLINE void finish(const Sums& acc, uint8_t* shared, const Epilogue& epilogue) {
  int32_t* sum = reinterpret_cast<int32_t*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int part = 0; part < kTokens / kPartTokens; ++part) {
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int group = 0; group < kPartTokens / 8; ++group)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int token = 8 * group + 2 * t + r % 2;
          const int output = (warp * kTiles + tile) * kTile + g + r / 2 * 8;
          sum[token * kSumStride<kOutputs> + output] = acc[tile][part * kPartTokens / 8 + group][r];
        }
    __syncthreads();
    finish_tile<kPartTokens, kOutputs, kThreads>(
        epilogue, sum, int64_t(blockIdx.y) * kTokens + part * kPartTokens, blockIdx.x * kOutputs);
  }
}

// grid (ceil(n / 128), ceil(rows / 64))
__global__ void __launch_bounds__(kThreads, 3)
    ternary_gemm(const uint32_t* __restrict__ words,  // ternary.cuh
                 const int8_t* __restrict__ q,        // [rows][128 blocks]
                 int32_t blocks, EPILOGUE_PARAMETERS) {
  DYNAMIC_SHARED(shared);
  const int64_t first = int64_t(blockIdx.y) * kTokens, row_bytes = int64_t(blocks) * kBlockK;

  // A thread copies one chunk of every 16th token.
  constexpr int kStep = kThreads / 8;
  const int token = threadIdx.x / 8, chunk = threadIdx.x % 8;
  const int place = token * kBlockK + 16 * (chunk ^ (token % 8));
  const int8_t* from = q + (first + token) * row_bytes + 16 * chunk;
  const int32_t left = int32_t(min(rows - first - token, int64_t(kTokens)));
  const auto copy_stage = [&](int32_t block) {
    uint8_t* to = shared + block % kStages * kStageBytes + place;
#pragma unroll
    for (int i = 0; i < kTokens; i += kStep) {
      const bool valid = i < left && block < blocks;
      copy_async(to + i * kBlockK, valid ? from + i * row_bytes + block * kBlockK : q, valid);
    }
    copy_async_commit();
  };

  // Tiles past the last panel repeat the last ones, and store nothing.
  const int32_t tiles = (n + kPanel - 1) / kPanel * (kPanel / kTile);
  const int32_t first_tile =
      min(int32_t(blockIdx.x * (kOutputs / kTile) + threadIdx.x / 32 * kTiles), tiles - kTiles);
  const auto load_words = [&](Words4(&w)[kTiles], int32_t block) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      w[tile] = *tile_words(words, blocks, first_tile + tile, min(block, blocks - 1));
  };

  Words4 weights[kTiles];
  Sums acc = {};
  for (int i = 0; i < kStages - 1; ++i) copy_stage(i);
  if (blocks > 0) load_words(weights, 0);
  for (int32_t block = 0; block < blocks; ++block) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the stage is here for all, and the one before it free
    copy_stage(block + kStages - 1);
    multiply(acc, weights, shared + block % kStages * kStageBytes,
             [&](Words4(&w)[kTiles]) { load_words(w, block + 1); });
  }
  copy_async_wait<0>();
  const Epilogue epilogue = EPILOGUE_ARGUMENTS;
  finish(acc, shared, epilogue);
}
