// Activations for ternary products: a norm of each row, its int8 values, and their sum.
//
//   rms    y = (x * r) * w + b,            r = 1 / sqrt(mean(x^2) + eps)
//   layer  y = ((x - mean) * r) * w + b,   r = 1 / sqrt(mean((x - mean)^2) + eps)
//   none   y = x
//   s = 127 / max(absmax(y), 1e-5),  q = clamp(rint(y * s), -128, 127), ties to even
//   sum = sum_k q                    |sum| <= 128 k
//
// The bits are those of csrc/rowwise/norms.h: a mean is 16 sums over every 16th element, each in
// ascending order by fused multiply-adds, then one tree. A row with NaN or an infinity gives q = 0
// and s = NaN.
//
// Rows are padded with zeros to whole blocks of 128. Two layouts:
//   plain  q[row][k]
//   tiled  q[row / 128][k / 128][row % 128][128], for wgmma: k in the order in which its A
//   fragments
//          have it (ternary.cuh), 16-byte chunk c at c ^ (row % 8), the swizzle of 128 bytes
#include "quantise_rows.cuh"

constexpr int kThreads = 256, kBlockK = 128, kTileRows = 128;

// Byte where four values from k = 4 word on stand, in plain or in tiled rows of `width` bytes.
template <bool kTiled>
INLINE int64_t place_of(int64_t row, int32_t word, int32_t width) {
  if (!kTiled) return row * width + 4 * word;
  const int32_t block = word / 32, t = word / 8 % 4, j = word / 2 % 4, h = word % 2;
  const int32_t chunk = (2 * j + h) ^ int32_t(row % 8);
  const int64_t tile = row / kTileRows * (width / kBlockK) + block;
  return (tile * kTileRows + row % kTileRows) * kBlockK + 16 * chunk + 4 * t;
}

// The sum over the block's threads, for thread 0.
INLINE int32_t block_sum(int32_t v, int32_t* scratch) {
  v = __reduce_add_sync(0xffffffffu, v);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  int32_t total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / 32; ++w) total += scratch[w];
  return total;
}

// A block takes a row; shared memory: float [row_pitch(k)].
template <int kKind, bool kTiled>
__global__ void __launch_bounds__(kThreads)
    norm_quantise(int8_t* q,                     // plain or tiled, rows of `width` bytes
                  float* scales, int32_t* sums,  // [rows]
                  const float* __restrict__ x,   // [rows][k], rows `stride` elements apart
                  const float* __restrict__ weight, const float* __restrict__ bias,  // [k] or null
                  int64_t stride, int32_t k, float eps, int32_t width) {
  DYNAMIC_SHARED(shared);
  __shared__ float scale;
  __shared__ int32_t sum;
  const int64_t at = blockIdx.x;
  quantise_rows<kKind, kThreads, false>(
      x + at * stride, stride, 1, k, width, {weight, bias, eps}, reinterpret_cast<float*>(shared),
      &scale, &sum, [&](int, int32_t word, uint32_t codes) {
        *reinterpret_cast<uint32_t*>(q + place_of<kTiled>(at, word, width)) = codes;
      });
  __syncthreads();
  if (threadIdx.x == 0) scales[at] = scale, sums[at] = sum;
}

// The same layouts from int8 rows as they are. A block takes a row.
template <bool kTiled>
__global__ void __launch_bounds__(kThreads)
    arrange(int8_t* q, int32_t* sums, const int8_t* __restrict__ x,  // [rows][k], `stride` apart
            int64_t stride, int32_t k, int32_t width) {
  __shared__ int32_t scratch[kThreads / 32];
  const int64_t at = blockIdx.x;
  int32_t sum = 0;
  for (int32_t word = threadIdx.x; word < width / 4; word += kThreads) {
    int32_t v[4];
    for (int b = 0; b < 4; ++b) {
      const int32_t i = 4 * word + b;
      v[b] = i < k ? x[at * stride + i] : 0;
      sum += v[b];
    }
    *reinterpret_cast<uint32_t*>(q + place_of<kTiled>(at, word, width)) = pack_bytes(v);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) sums[at] = sum;
}
