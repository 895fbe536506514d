// The rows of a block, normed and quantised in shared memory: quantise.cu has the formulas.
#pragma once
#include "norms.cuh"

constexpr int kMostRows = 4;  // of a block, as in quantise.py

struct NormOf {
  const float *weight, *bias;  // [k] or null
  float eps;
};

// Rows of floats in shared memory begin on 16 bytes.
INLINE int32_t row_pitch(int32_t k) { return (k + 3) / 4 * 4; }

INLINE uint32_t pack_bytes(const int32_t (&v)[4]) {
  return uint32_t(v[0] & 255) | uint32_t(v[1] & 255) << 8 | uint32_t(v[2] & 255) << 16 |
         uint32_t(v[3]) << 24;
}

// Rows x[0], x[stride], ... of k: store(m, word, four codes) for words of `width` bytes, and the
// scales and sums, which are in shared memory and there for all after a barrier.
//   values    float [rows + 1][row_pitch(k)], shared; the last one for the norm's weight, which
//             only kStaged needs: its bytes come while the moments are summed
template <int kKind, int kThreads, bool kStaged, class Store>
INLINE void quantise_rows(const float* x, int64_t stride, int32_t rows, int32_t k, int32_t width,
                          const NormOf& norm, float* values, float* scales, int32_t* sums,
                          Store store) {
  __shared__ float2 moment[kMostRows];
  __shared__ int32_t top_bits[kMostRows];
  const int32_t thread = threadIdx.x, pitch = row_pitch(k);
  const bool staged = kStaged && kKind != kNone && norm.weight;
  for (int32_t m = 0; m < rows; ++m) fetch_floats<kThreads>(values + m * pitch, x + m * stride, k);
  copy_async_commit();
  if (staged) fetch_floats<kThreads>(values + rows * pitch, norm.weight, k);
  copy_async_commit();
  if (thread < rows) top_bits[thread] = sums[thread] = 0;
  copy_async_wait<1>();
  __syncthreads();
  if (kKind != kNone && thread / 32 < rows && thread % 32 < kLanes) {
    const float2 found = moments<kKind>(values + thread / 32 * pitch, k, norm.eps);
    if (thread % 32 == 0) moment[thread / 32] = found;
  }
  copy_async_wait<0>();
  if (kKind != kNone) __syncthreads();

  const float* weight = staged ? values + rows * pitch : norm.weight;
  for (int32_t m = 0; m < rows; ++m) {
    float* row = values + m * pitch;
    // As integers, absolute values keep their order, and NaN stands above infinity.
    int32_t top = 0;
#pragma unroll 4
    for (int32_t i = thread; i < k; i += kThreads) {
      float y = row[i];
      if (kKind == kLayer) y = sub_rn(y, moment[m].x);
      if (kKind != kNone) {
        y = mul_rn(y, moment[m].y);
        if (weight) y = mul_rn(y, weight[i]);
        if (norm.bias) y = add_rn(y, norm.bias[i]);
      }
      row[i] = y;
      top = max(top, __float_as_int(magnitude(y)));
    }
    top = __reduce_max_sync(0xffffffffu, top);
    if (thread % 32 == 0) atomicMax(top_bits + m, top);
  }
  __syncthreads();

  for (int32_t m = 0; m < rows; ++m) {
    const float* row = values + m * pitch;
    const int32_t top = top_bits[m];
    const float s = top < 0x7f800000 ? div_rn(127.0f, max_num(__int_as_float(top), 1e-5f))
                                     : __int_as_float(0x7fc00000);
    int32_t sum = 0;
    for (int32_t word = thread; word < width / 4; word += kThreads) {
      int32_t v[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int32_t i = 4 * word + b;
        v[b] = i < k ? min(127, max(-128, round_to_int(mul_rn(row[i], s)))) : 0;
        sum += v[b];
      }
      store(m, word, pack_bytes(v));
    }
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (thread % 32 == 0) atomicAdd(sums + m, sum);
    if (thread == 0) scales[m] = s;
  }
}
