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
#include "norms.cuh"

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

INLINE uint32_t pack_bytes(const int32_t (&v)[4]) {
  return uint32_t(v[0] & 255) | uint32_t(v[1] & 255) << 8 | uint32_t(v[2] & 255) << 16 |
         uint32_t(v[3]) << 24;
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

// A block takes a row; shared memory: float[k].
template <int kKind, bool kTiled>
__global__ void __launch_bounds__(kThreads)
    norm_quantise(int8_t* q,                     // plain or tiled, rows of `width` bytes
                  float* scales, int32_t* sums,  // [rows]
                  const float* __restrict__ x,   // [rows][k], rows `stride` elements apart
                  const float* __restrict__ weight, const float* __restrict__ bias,  // [k] or null
                  int64_t stride, int32_t k, int32_t width, float eps) {
  DYNAMIC_SHARED(shared);
  __shared__ float2 moment;
  __shared__ int32_t top_bits, scratch[kThreads / 32];
  float* row = reinterpret_cast<float*>(shared);
  const int64_t at = blockIdx.x;
  const int thread = threadIdx.x;
  if (thread == 0) top_bits = 0;
  for (int32_t i = thread; i < k; i += kThreads) row[i] = x[at * stride + i];
  __syncthreads();
  if (kKind != kNone) {
    if (thread < kLanes) {
      const float2 m = moments<kKind>(row, k, eps);
      if (thread == 0) moment = m;
    }
    __syncthreads();
  }
  // As integers, absolute values keep their order, and NaN stands above infinity.
  int32_t top = 0;
  for (int32_t i = thread; i < k; i += kThreads) {
    float y = row[i];
    if (kKind == kLayer) y = sub_rn(y, moment.x);
    if (kKind != kNone) {
      y = mul_rn(y, moment.y);
      if (weight) y = mul_rn(y, weight[i]);
      if (bias) y = add_rn(y, bias[i]);
    }
    row[i] = y;
    top = max(top, __float_as_int(magnitude(y)));
  }
  top = __reduce_max_sync(0xffffffffu, top);
  if (thread % 32 == 0) atomicMax(&top_bits, top);
  __syncthreads();
  const float s = top_bits < 0x7f800000 ? div_rn(127.0f, max_num(__int_as_float(top_bits), 1e-5f))
                                        : __int_as_float(0x7fc00000);
  int32_t sum = 0;
  for (int32_t word = thread; word < width / 4; word += kThreads) {
    int32_t v[4];
    for (int b = 0; b < 4; ++b) {
      const int32_t i = 4 * word + b;
      v[b] = i < k ? min(127, max(-128, round_to_int(mul_rn(row[i], s)))) : 0;
      sum += v[b];
    }
    *reinterpret_cast<uint32_t*>(q + place_of<kTiled>(at, word, width)) = pack_bytes(v);
  }
  sum = block_sum(sum, scratch);
  if (thread == 0) scales[at] = s, sums[at] = sum;
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
