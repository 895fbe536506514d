// Mean and variance of a row with the bits of csrc/rowwise/norms.h: 16 sums over every 16th
// element, each in ascending order, then one tree.
#pragma once
#include "ptx.cuh"

constexpr int kLanes = 16;
constexpr int kNone = 0, kRms = 1, kLayer = 2;

// The tree over 16 lanes of a warp, in each: x[i] + x[i + 8], then + 4, + 2, + 1.
INLINE float lanes_sum(float v) {
  for (int by = 8; by; by >>= 1) v = add_rn(v, __shfl_xor_sync(0xffffu, v, by));
  return v;
}

// Mean and 1 / sqrt(variance + eps) of a row; threads 0..15 take part, and have the result.
template <int kKind>
INLINE float2 moments(const float* row, int32_t n, float eps) {
  float mean = 0.0f;
  if (kKind == kLayer) {
    float sum = 0.0f;
#pragma unroll 8
    for (int32_t i = threadIdx.x; i < n; i += kLanes) sum = add_rn(sum, row[i]);
    mean = div_rn(lanes_sum(sum), to_float(n));
  }
  float squares = 0.0f;
#pragma unroll 8
  for (int32_t i = threadIdx.x; i < n; i += kLanes) {
    const float v = kKind == kLayer ? sub_rn(row[i], mean) : row[i];
    squares = fma_rn(v, v, squares);
  }
  const float variance = div_rn(lanes_sum(squares), to_float(n));
  return make_float2(mean, div_rn(1.0f, sqrt_rn(add_rn(variance, eps))));
}
