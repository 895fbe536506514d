// Products of many tokens on Hopper's matrix units: y[m][o] = sum_k q[m][k] w[o][k].
//
// A block takes 256 outputs x 128 tokens: two warpgroups of 128 outputs x 128 tokens, 128 sums a
// thread, and a warp that fills kStages stages of tokens by bulk copies. Weights go from global
// memory to registers as the instruction's A, one block of k ahead; tokens are its B, in the tiled
// layout of quantise.cu, a stage one copy of 16 KB. While one warpgroup decodes (some 100
// instructions), the other's eight instructions of 64 cycles keep the matrix units busy.
//
// A block of k reads 16 KB of tokens and 8 KB of weights for 1024 cycles of products: tiles are
// wide in outputs because weights are the cheaper side. Blocks stay for all their share of the
// tiles (share.cuh), so that every multiprocessor has the same work, and the producer goes on to
// the next tile while the sums of one become outputs.
//
//   full[stage]    the stage's bytes have come; the producer arrives
//   empty[stage]   nobody reads the stage any more; every consumer warp arrives
#include "bulk.cuh"
#include "epilogue.cuh"
#include "share.cuh"
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

// Which stage comes next, of all that a block uses; producer and consumers count alike.
struct Turn {
  int32_t stage = 0;
  uint32_t round = 0;

  INLINE void next() {
    if (++stage < kStages) return;
    stage = 0;
    ++round;
  }
};

// `tokens`: the tile's, [blocks][kStageBytes].
INLINE void produce(const Stages& stages, Turn& turn, const int8_t* tokens, int32_t first,
                    int32_t last) {
  for (int32_t block = first; block < last; ++block, turn.next()) {
    const int32_t stage = turn.stage;
    barrier_wait(stages.empty + stage, (turn.round & 1) ^ 1);
    barrier_arrive_expect(stages.full + stage, kStageBytes);
    copy_bulk(stages.tokens + stage * kStageBytes, tokens + int64_t(block) * kStageBytes,
              kStageBytes, stages.full + stage);
  }
}

// acc[p] += panel first + p times the tokens, over blocks [first, last) of k.
INLINE void consume(int32_t (&acc)[2][64], const Stages& stages, Turn& turn, const uint32_t* words,
                    int32_t blocks, const int32_t (&tile)[2], int32_t first, int32_t last) {
  Words4 next[2];
  for (int p = 0; p < 2; ++p) next[p] = *tile_words(words, blocks, tile[p], first);
  for (int32_t block = first; block < last; ++block, turn.next()) {
    const int32_t stage = turn.stage;
    uint32_t a[kSteps][2][4];
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
#pragma unroll
      for (int p = 0; p < 2; ++p) codes(next[p], j, a[j][p]);
#pragma unroll
    for (int p = 0; p < 2; ++p)
      next[p] = *tile_words(words, blocks, tile[p], min(block + 1, blocks - 1));
    barrier_wait(stages.full + stage, turn.round & 1);
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
INLINE void finish(const int32_t (&acc)[2][64], int32_t* sum,  // [kPartTokens][kSumStride]
                   const Epilogue& epilogue, int64_t token, int32_t output) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row = warp / 4 * 2 * kPanel + warp % 4 * kTile + g;
#pragma unroll
  for (int part = 0; part < kTokens / kPartTokens; ++part) {
    named_barrier_sync(1, kConsumers);  // nobody needs what the sums take the place of
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
      for (int i = 0; i < kPartTokens / 2; ++i) {
        const int column = i / 4 * 8 + 2 * t + i % 2, at = row + kPanel * p + i / 2 % 2 * 8;
        sum[column * kSumStride<kOutputs> + at] = acc[p][kPartTokens / 2 * part + i];
      }
    named_barrier_sync(1, kConsumers);
    finish_tile<kPartTokens, kOutputs, kConsumers>(epilogue, sum, token + part * kPartTokens,
                                                   output);
  }
}

// grid (blocks, at most units of share.cuh); shared memory: stages, sums, barriers
__global__ void __launch_bounds__(kThreads, 1)
    ternary_wgmma(const uint32_t* __restrict__ words,  // ternary.cuh
                  const int8_t* __restrict__ q,        // tiled (quantise.cu)
                  int32_t blocks, int32_t* split_sums, int32_t* split_tickets,  // of a SplitRoom
                  EPILOGUE_PARAMETERS) {
  DYNAMIC_SHARED(shared);
  int32_t* sum = reinterpret_cast<int32_t*>(shared + kStages * kStageBytes);
  barrier_t* barriers = reinterpret_cast<barrier_t*>(sum + kPartTokens * kSumStride<kOutputs>);
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
  const int32_t across = (n + kOutputs - 1) / kOutputs;  // tiles of the same tokens
  Share share;
  share.begin(across * ((rows + kTokens - 1) / kTokens), blocks);
  Piece piece;
  Turn turn;
  if (warp >= kConsumers / 32) {
    give_registers<kProducerRegisters>();
    if (warp > kConsumers / 32 || lane != 0) return;
    while (share.next(piece))
      produce(stages, turn, q + int64_t(piece.tile / across) * blocks * kStageBytes, piece.first,
              min(piece.last, blocks));
    return;
  }
  take_registers<kConsumerRegisters>();
  const Epilogue epilogue = EPILOGUE_ARGUMENTS;
  const int32_t panels = (n + kPanel - 1) / kPanel;
  while (share.next(piece)) {
    // Panels past the last repeat it, and store nothing.
    const int32_t output = piece.tile % across * kOutputs;
    const int32_t first_panel = output / kPanel + warp / 4 * 2;
    const int32_t tile[2] = {4 * min(first_panel, panels - 1) + warp % 4,
                             4 * min(first_panel + 1, panels - 1) + warp % 4};
    int32_t acc[2][64] = {};
    if (blocks > 0) consume(acc, stages, turn, words, blocks, tile, piece.first, piece.last);
    if (gather<kConsumers>(acc, {split_sums, split_tickets}, piece,
                           [] { named_barrier_sync(1, kConsumers); }))
      finish(acc, sum, epilogue, int64_t(piece.tile / across) * kTokens, output);
  }
}
