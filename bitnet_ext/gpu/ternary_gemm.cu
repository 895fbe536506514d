// Products of many tokens on the matrix units of a warp: y[m][o] = sum_k q[m][k] w[o][k].
//
// A block of 4 warps takes 128 outputs x kTokens tokens, a warp 32 x kTokens of them: 64 sums a
// thread at 64 tokens, and a decoded weight serves all of them. Three blocks fit a multiprocessor;
// they share the tiles and their k out evenly (share.cuh). Weights go from global memory to
// registers in the order of their fragments, half a block of k ahead; tokens go through kStages
// stages of shared memory by asynchronous copies.
//
//   a stage   [kTokens][128 bytes of k], 16-byte chunk c at c ^ (token % 8): a quarter warp reads
//             chunks 2 t + i of two neighbouring tokens, which lie in all 32 banks
//   at the end the same memory takes 32 tokens' sums, int32 [32][128 + 4], for the epilogue
#include "epilogue.cuh"
#include "share.cuh"
#include "ternary.cuh"

constexpr int kOutputs = 128, kThreads = 128, kStages = 4;
constexpr int kTiles = 2;  // of a warp: 16 outputs
constexpr int kPartTokens = 32;

// Of a warp's tiles and groups of 8 tokens.
template <int kTokens>
using Sums = int32_t[kTiles * kTokens / 8][4];

// One block of k for a warp. load_next(words) comes as soon as the words are all decoded, half of
// the products before they are needed again.
template <int kTokens, class LoadNext>
INLINE void multiply(Sums<kTokens>& acc, Words4 (&words)[kTiles], const uint8_t* stage,
                     LoadNext load_next) {
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
    for (int group = 0; group < kTokens / 8; ++group) {
      const uint8_t* token = stage + (8 * group + g) * kBlockK;
      const Words4 x = *reinterpret_cast<const Words4*>(token + 16 * ((2 * t + pair) ^ g));
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint32_t b[2] = {x.x[2 * j], x.x[2 * j + 1]};
          mma_u8_s8(acc[tile * kTokens / 8 + group], a[j][tile], b);
        }
    }
  }
}

// The sums of all warps, by parts of the tokens, through shared memory to the epilogue.
template <int kTokens>
INLINE void finish(const Sums<kTokens>& acc, uint8_t* shared, const Epilogue& epilogue,
                   int64_t first_token, int32_t first_output) {
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
          const int from = tile * kTokens / 8 + part * kPartTokens / 8 + group;
          sum[token * kSumStride<kOutputs> + output] = acc[from][r];
        }
    __syncthreads();
    finish_tile<kPartTokens, kOutputs, kThreads>(epilogue, sum, first_token + part * kPartTokens,
                                                 first_output);
  }
}

// acc = the sums of blocks [first, last) of k, of outputs from `output` on and tokens at q.
template <int kTokens>
INLINE void sum_up(Sums<kTokens>& acc, const uint32_t* words, const int8_t* q, int32_t blocks,
                   int32_t first, int32_t last, int64_t tokens, int32_t output, int32_t n,
                   uint8_t* shared) {
  constexpr int kStageBytes = kTokens * kBlockK;
  const int64_t row_bytes = int64_t(blocks) * kBlockK;
  // A thread copies one chunk of every 16th token.
  constexpr int kStep = kThreads / 8;
  const int token = threadIdx.x / 8, chunk = threadIdx.x % 8;
  const int place = token * kBlockK + 16 * (chunk ^ (token % 8));
  const int8_t* from = q + token * row_bytes + 16 * chunk;
  const int32_t left = int32_t(min(tokens - token, int64_t(kTokens)));
  const auto copy_stage = [&](int32_t block) {
    uint8_t* to = shared + block % kStages * kStageBytes + place;
#pragma unroll
    for (int i = 0; i < kTokens; i += kStep) {
      const bool valid = i < left && block < last;
      copy_async(to + i * kBlockK, valid ? from + i * row_bytes + block * kBlockK : q, valid);
    }
    copy_async_commit();
  };

  // Tiles past the last panel repeat the last ones, and store nothing.
  const int32_t tiles = (n + kPanel - 1) / kPanel * (kPanel / kTile);
  const int32_t first_tile =
      min(output / kTile + int32_t(threadIdx.x) / 32 * kTiles, tiles - kTiles);
  const auto load_words = [&](Words4(&w)[kTiles], int32_t block) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      w[tile] = *tile_words(words, blocks, first_tile + tile, min(block, blocks - 1));
  };

  Words4 weights[kTiles];
  load_words(weights, first);
  for (int i = 0; i < kStages - 1; ++i) copy_stage(first + i);
  for (int32_t block = first; block < last; ++block) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the stage is here for all, and the one before it free
    copy_stage(block + kStages - 1);
    multiply<kTokens>(acc, weights, shared + block % kStages * kStageBytes,
                      [&](Words4(&w)[kTiles]) { load_words(w, block + 1); });
  }
  copy_async_wait<0>();
}

// grid (blocks, at most units of share.cuh)
template <int kTokens>
__global__ void __launch_bounds__(kThreads, 3)
    ternary_gemm(const uint32_t* __restrict__ words,                           // ternary.cuh
                 const int8_t* __restrict__ q,                                 // [rows][128 blocks]
                 int32_t blocks, int32_t* split_sums, int32_t* split_tickets,  // of a SplitRoom
                 EPILOGUE_PARAMETERS) {
  DYNAMIC_SHARED(shared);
  const Epilogue epilogue = EPILOGUE_ARGUMENTS;
  const int32_t across = (n + kOutputs - 1) / kOutputs;  // tiles of the same tokens
  // In shared memory: the sums leave no registers for them.
  __shared__ Share share;
  __shared__ Piece piece;
  __shared__ bool more;
  if (threadIdx.x == 0) share.begin(across * ((rows + kTokens - 1) / kTokens), blocks);
  for (;;) {
    if (threadIdx.x == 0) more = share.next(piece);
    __syncthreads();
    if (!more) return;
    const int64_t token = int64_t(piece.tile / across) * kTokens;
    const int32_t output = piece.tile % across * kOutputs;
    Sums<kTokens> acc = {};
    if (blocks > 0)
      sum_up<kTokens>(acc, words, q + token * blocks * kBlockK, blocks, piece.first, piece.last,
                      rows - token, output, n, shared);
    if (gather<kThreads>(acc, {split_sums, split_tickets}, piece, [] { __syncthreads(); }))
      finish<kTokens>(acc, shared, epilogue, int64_t(piece.tile / across) * kTokens,
                      piece.tile % across * kOutputs);
    __syncthreads();  // stages, and what says which piece, are free
  }
}
