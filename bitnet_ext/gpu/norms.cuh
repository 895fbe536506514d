// Mean and variance of a row with the bits of csrc/rowwise/norms.h: 16 sums over every 16th
// element, each in ascending order, then one tree.
#pragma once
#include "async.cuh"

constexpr int kLanes = 16;
constexpr int kNone = 0, kRms = 1, kLayer = 2;

// Start to copy n floats to shared memory; whole words of 16 bytes where they can be.
template <int kThreads>
INLINE void fetch_floats(float* to, const float* from, int32_t n) {
  int32_t done = 0;
  if ((uint64_t(from) & 15) == 0) {
    done = n / 4 * 4;
    for (int32_t i = 4 * threadIdx.x; i < done; i += 4 * kThreads) copy_async(to + i, from + i);
  }
  for (int32_t i = done + threadIdx.x; i < n; i += kThreads) to[i] = from[i];
}

// The tree over 16 lanes of a warp, in each: x[i] + x[i + 8], then + 4, + 2, + 1.
INLINE float lanes_sum(float v) {
  for (int by = 8; by; by >>= 1) v = add_rn(v, __shfl_xor_sync(0xffffu, v, by));
  return v;
}

// sum = add(sum, x) for this lane's elements of a row in ascending order. A chain takes 4 cycles a
// step: the next kAhead elements come while these are added.
template <class Add>
INLINE float chain(const float* row, int32_t n, Add add) {
  constexpr int kAhead = 8;
  const int32_t lane = threadIdx.x % 32, mine = (n - lane + kLanes - 1) / kLanes;
  const float* from = row + lane;
  float sum = 0.0f;
  int32_t i = 0;
  if (mine >= kAhead) {
    float now[kAhead], next[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) next[j] = from[j * kLanes];
    for (;;) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) now[j] = next[j];
      i += kAhead;
      const bool more = i + kAhead <= mine;
      if (more)
#pragma unroll
        for (int j = 0; j < kAhead; ++j) next[j] = from[(i + j) * kLanes];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) sum = add(sum, now[j]);
      if (!more) break;
    }
  }
  for (; i < mine; ++i) sum = add(sum, from[i * kLanes]);
  return sum;
}

// Mean and 1 / sqrt(variance + eps) of a row; lanes 0..15 of a warp take part, and have the result.
template <int kKind>
INLINE float2 moments(const float* row, int32_t n, float eps) {
  float mean = 0.0f;
  if (kKind == kLayer)
    mean = div_rn(lanes_sum(chain(row, n, [](float sum, float x) { return add_rn(sum, x); })),
                  to_float(n));
  const float squares = chain(row, n, [mean](float sum, float x) {
    const float v = kKind == kLayer ? sub_rn(x, mean) : x;
    return fma_rn(v, v, sum);
  });
  const float variance = div_rn(lanes_sum(squares), to_float(n));
  return make_float2(mean, div_rn(1.0f, sqrt_rn(add_rn(variance, eps))));
}
