// Products of many tokens on Hopper's matrix units: y[m][o] = sum_k q[m][k] w[o][k].
//
// A block takes 256 outputs x 128 tokens: two warpgroups of 128 outputs x 128 tokens, 128 sums a
// thread, and a warp that fills kStages stages of tokens by bulk copies. Weights go from global
// memory to registers as the instruction's A, one block of k ahead; tokens are its B, in the tiled
// layout of quantise.cu, a stage one copy of 16 KB. While one warpgroup decodes (some 100
// instructions), the other's eight instructions of 64 cycles keep the matrix units busy.
//
// A block of k reads 16 KB of tokens and 8 KB of weights for 1024 cycles of products: tiles are
// wide in outputs because weights are the cheaper side.
//
//   full[stage]    the stage's bytes have come; the producer arrives
//   empty[stage]   nobody reads the stage any more; every consumer warp arrives
#include "bulk.cuh"
#include "epilogue.cuh"
#include "ternary.cuh"
#include "wgmma.cuh"

constexpr int kOutputs = 256, kTokens = 128, kStages = 6, kStageBytes = kTokens * kBlockK;
constexpr int kGroupThreads = 128, kConsumers = 2 * kGroupThreads;
constexpr int kThreads = kConsumers + kGroupThreads;
// 65536 registers: 168 a thread at the start, 2 * 128 * 232 + 128 * 40 afterwards.
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
constexpr int kPartTokens = 64;

struct Stages {
  uint8_t* tokens;   // [kStages][kStageBytes]
  barrier_t* full;   // [kStages]
  barrier_t* empty;  // [kStages]
};

INLINE void produce(const Stages& stages, const int8_t* tile, int32_t blocks) {
  for (int32_t block = 0; block < blocks; ++block) {
    const int32_t stage = block % kStages, round = block / kStages;
    barrier_wait(stages.empty + stage, (round & 1) ^ 1);
    barrier_arrive_expect(stages.full + stage, kStageBytes);
    copy_bulk(stages.tokens + stage * kStageBytes, tile + int64_t(block) * kStageBytes, kStageBytes,
              stages.full + stage);
  }
}

// acc[p] += panel first + p times the tokens of the block.
INLINE void consume(int32_t (&acc)[2][64], const Stages& stages, const uint32_t* words,
                    int32_t blocks, const int32_t (&tile)[2]) {
  Words4 next[2];
  for (int p = 0; p < 2; ++p) next[p] = *tile_words(words, blocks, tile[p], 0);
  for (int32_t block = 0; block < blocks; ++block) {
    const int32_t stage = block % kStages;
    uint32_t a[kSteps][2][4];
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
#pragma unroll
      for (int p = 0; p < 2; ++p) codes(next[p], j, a[j][p]);
#pragma unroll
    for (int p = 0; p < 2; ++p)
      next[p] = *tile_words(words, blocks, tile[p], min(block + 1, blocks - 1));
    barrier_wait(stages.full + stage, block / kStages & 1);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
#pragma unroll
      for (int p = 0; p < 2; ++p)
        wgmma_u8_s8(acc[p], a[j][p], wgmma_columns(stages.tokens + stage * kStageBytes, 32 * j));
    wgmma_commit();
    wgmma_wait<0>();
    if (threadIdx.x % 32 == 0) barrier_arrive(stages.empty + stage);
  }
}

// The sums of both warpgroups, by parts of the tokens, through shared memory to the epilogue.
INLINE void finish(const int32_t (&acc)[2][64], uint8_t* shared, const Epilogue& epilogue) {
  int32_t* sum = reinterpret_cast<int32_t*>(shared);  // [kPartTokens][kSumStride<kOutputs>]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row = warp / 4 * 2 * kPanel + warp % 4 * kTile + g;
#pragma unroll
  for (int part = 0; part < kTokens / kPartTokens; ++part) {
    named_barrier_sync(1, kConsumers);  // nobody needs what the sums take the place of
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
      for (int i = 0; i < kPartTokens / 2; ++i) {
        const int token = i / 4 * 8 + 2 * t + i % 2, output = row + kPanel * p + i / 2 % 2 * 8;
        sum[token * kSumStride<kOutputs> + output] = acc[p][kPartTokens / 2 * part + i];
      }
    named_barrier_sync(1, kConsumers);
    finish_tile<kPartTokens, kOutputs, kConsumers>(
        epilogue, sum, int64_t(blockIdx.y) * kTokens + part * kPartTokens, blockIdx.x * kOutputs);
  }
}

// grid (ceil(n / 256), ceil(rows / 128))
__global__ void __launch_bounds__(kThreads, 1)
    ternary_wgmma(const uint32_t* __restrict__ words,  // ternary.cuh
                  const int8_t* __restrict__ q,        // tiled (quantise.cu)
                  int32_t blocks, EPILOGUE_PARAMETERS) {
  DYNAMIC_SHARED(shared);
  barrier_t* barriers = reinterpret_cast<barrier_t*>(shared + kStages * kStageBytes);
  const Stages stages = {shared, barriers, barriers + kStages};
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(stages.full + i, 1);
      barrier_init(stages.empty + i, kConsumers / 32);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (warp >= kConsumers / 32) {
    give_registers<kProducerRegisters>();
    if (warp == kConsumers / 32 && lane == 0)
      produce(stages, q + int64_t(blockIdx.y) * blocks * kStageBytes, blocks);
  } else {
    take_registers<kConsumerRegisters>();
    // Panels past the last repeat it, and store nothing.
    const int32_t panels = (n + kPanel - 1) / kPanel;
    const int32_t first_panel = 4 * blockIdx.x + warp / 4 * 2;
    const int32_t tile[2] = {4 * min(first_panel, panels - 1) + warp % 4,
                             4 * min(first_panel + 1, panels - 1) + warp % 4};
    int32_t acc[2][64] = {};
    if (blocks > 0) consume(acc, stages, words, blocks, tile);

    const Epilogue epilogue = EPILOGUE_ARGUMENTS;
    finish(acc, shared, epilogue);
  }
}
