// Products of few tokens: y[m][o] = sum_k q[m][k] w[o][k], limited by the bytes of w.
//
// A block of 8 warps takes kTiles tiles of 16 outputs and splits k among 8 / kTiles warps each; a
// warp keeps kFlight loads of 512 bytes of weights in flight, and multiplies them with 8 or 16
// tokens by matrix instructions, whose idle columns cost nothing. Partial sums are integers, so the
// order in which they meet does not matter.
//
// norm_gemv takes up to 4 rows of floats, and norms and quantises them in every block while the
// first weights come: that costs reads of the rows from the second-level cache, and saves a launch
// and the wait for it (product.py weighs the two).
#include "epilogue.cuh"
#include "quantise_rows.cuh"
#include "ternary.cuh"

constexpr int kWarps = 8, kThreads = 32 * kWarps;

// A warp's part of a tile's blocks of k: every step-th from `first` on.
template <int kFlight>
struct Stream {
  const uint32_t* words;
  int32_t blocks, tile, first, step;
  Words4 ring[kFlight];

  INLINE void load(Words4& to, int32_t block) const {
    if (block < blocks) to = load_streaming(tile_words(words, blocks, tile, block));
  }
  INLINE void start() {
#pragma unroll
    for (int i = 0; i < kFlight; ++i) load(ring[i], first + i * step);
  }
  // use(words, block) for each.
  template <class Use>
  INLINE void run(Use use) {
    for (int32_t begin = first; begin < blocks; begin += kFlight * step) {
#pragma unroll
      for (int i = 0; i < kFlight; ++i) {
        const int32_t block = begin + i * step;
        if (block >= blocks) break;
        const Words4 now = ring[i];
        load(ring[i], block + kFlight * step);
        use(now, block);
      }
    }
  }
};

// Of a warp: sums of a tile's codes times 8 kGroups tokens, those of field j times 4^j.
// Overflow: |acc[3]| <= 2 * 64 * 128 * k / 4 over its part of k, 2^28 for a quarter of k = 2^18.
template <int kGroups>
struct Sums {
  int32_t acc[kGroups][kSteps][4];

  INLINE void clear() {
#pragma unroll
    for (int i = 0; i < kGroups * kSteps * 4; ++i) acc[i / (4 * kSteps)][i / 4 % kSteps][i % 4] = 0;
  }
  // x: the lane's 32 bytes of its token of the group.
  INLINE void add(int group, const Words4& words, const Words4* x) {
    const Words4 half[2] = {x[0], x[1]};
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      uint32_t a[4];
      scaled_codes(words, j, a);
      const uint32_t b[2] = {half[j / 2].x[j % 2 * 2], half[j / 2].x[j % 2 * 2 + 1]};
      mma_u8_s8(acc[group][j], a, b);
    }
  }
};

// The sums of all warps meet in shared memory, and become outputs of tokens from `first` on.
template <int kGroups, int kTiles>
INLINE void finish(const Sums<kGroups>& sums, int64_t first, const Epilogue& epilogue) {
  constexpr int kSlices = kWarps / kTiles, kTokens = 8 * kGroups;
  __shared__ int32_t partial[kSlices][kTiles][kTokens][kTile];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kGroups; ++i)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const auto& a = sums.acc[i];
      partial[warp / kTiles][warp % kTiles][8 * i + 2 * t + r % 2][g + r / 2 * 8] =
          a[0][r] + (a[1][r] >> 2) + (a[2][r] >> 4) + (a[3][r] >> 6);
    }
  __syncthreads();
  for (int i = threadIdx.x; i < kTiles * kTokens * 8; i += kThreads) {
    const int low = i % 8, at = i / 8 % kTiles, m = i / 8 / kTiles;
    if (first + m >= epilogue.rows) break;
    int32_t sum[2] = {};
#pragma unroll
    for (int k = 0; k < kSlices; ++k) {
      sum[0] += partial[k][at][m][low];
      sum[1] += partial[k][at][m][low + 8];
    }
    epilogue.finish(sum[0], sum[1], first + m, (blockIdx.x * kTiles + at) * kTile + low);
  }
}

// grid (tiles / kTiles, tokens / 8 kGroups)
template <int kGroups, int kTiles>
__global__ void __launch_bounds__(kThreads)
    ternary_gemv(const uint32_t* __restrict__ words,  // ternary.cuh
                 const int8_t* __restrict__ q,        // [rows][128 blocks]
                 int32_t blocks, EPILOGUE_PARAMETERS) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t first = blockIdx.y * 8 * kGroups;
  // A column past the tokens repeats the last; its sums are not stored.
  const int8_t* token[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i)
    token[i] =
        q + min(first + 8 * i + lane / 4, rows - 1) * int64_t(blocks) * kBlockK + 32 * (lane % 4);
  Stream<4> stream = {words, blocks, int32_t(blockIdx.x) * kTiles + warp % kTiles, warp / kTiles,
                      kWarps / kTiles};
  stream.start();
  Sums<kGroups> total;
  total.clear();
  stream.run([&](const Words4& w, int32_t block) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
      total.add(i, w, reinterpret_cast<const Words4*>(token[i] + block * kBlockK));
  });
  const Epilogue epilogue = EPILOGUE_ARGUMENTS;
  finish<kGroups, kTiles>(total, first, epilogue);
}

// grid (tiles / kTiles); shared memory: values of quantise_rows, then the codes, int8
// [rows][128 blocks + 16]: eight lanes read 16 bytes each of two tokens from different banks.
template <int kKind, int kTiles>
__global__ void __launch_bounds__(kThreads, 2)
    norm_gemv(const uint32_t* __restrict__ words,     // ternary.cuh
              const float* __restrict__ x,            // [rows][k], rows `stride` elements apart
              const float* __restrict__ norm_weight,  // [k] or null
              const float* __restrict__ norm_bias,    // likewise
              int64_t stride, int32_t k, float eps, int32_t blocks, EPILOGUE_PARAMETERS) {
  DYNAMIC_SHARED(shared);
  __shared__ float scales[kMostRows];
  __shared__ int32_t code_sums[kMostRows];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Stream<8> stream = {words, blocks, int32_t(blockIdx.x) * kTiles + warp % kTiles, warp / kTiles,
                      kWarps / kTiles};
  stream.start();

  float* values = reinterpret_cast<float*>(shared);
  uint8_t* codes = reinterpret_cast<uint8_t*>(values + (rows + 1) * row_pitch(k));
  const int32_t width = blocks * kBlockK, pitch = width + 16;
  quantise_rows<kKind, kThreads, true>(
      x, stride, rows, k, width, {norm_weight, norm_bias, eps}, values, scales, code_sums,
      [&](int m, int32_t word, uint32_t four) {
        *reinterpret_cast<uint32_t*>(codes + m * pitch + 4 * word) = four;
      });
  __syncthreads();
  const uint8_t* token = codes + min(lane / 4, rows - 1) * pitch + 32 * (lane % 4);
  Sums<1> total;
  total.clear();
  stream.run([&](const Words4& w, int32_t block) {
    total.add(0, w, reinterpret_cast<const Words4*>(token + block * kBlockK));
  });
  Epilogue epilogue = EPILOGUE_ARGUMENTS;
  epilogue.sums = code_sums;
  epilogue.s = scales;
  finish<1, kTiles>(total, 0, epilogue);
}
