// Attention of a tile of query vectors over blocks of 64 keys, with the bits of the CPU's
// (csrc/attention/attention.h): an online softmax (Milakov and Gimelshein, arXiv:1805.02867;
// FlashAttention, arXiv:2205.14135) in float32.
//
//   s[j] = the score of key j          a sequential FMA over dk, then the caller's steps
//   m'   = max(m, max s),  c = exp(m - m'),  p[j] = exp(s[j] - m')
//   l    = l c + p                     16 partial sums, lane = key mod 16
//   o    = o c + sum p[j] v[j]         a sequential FMA over keys, hidden ones skipped
//
// 128 threads are 8 groups of 16 lanes. A group has kEach vectors; lane i of it has the keys i,
// i + 16, i + 32, i + 48 of a block, partial sum i of l, and columns 4 i..4 i + 3 (and 64 + those)
// of o. Keys, and then values, of a block stand in shared memory, 128 dimensions at a time.
#pragma once
#include "kinds.cuh"
#include "merge.cuh"

constexpr int kThreads = 128, kLanes = 16, kGroups = kThreads / kLanes;
constexpr int kBlockKeys = 64, kTiles = kBlockKeys / kLanes;
constexpr int kSlice = 128;  // dimensions in shared memory at a time
// Floats of a row in shared memory; 4 more than needed, so that rows begin in different banks.
constexpr int kRow = kSlice + 4, kWeights = kBlockKeys + 4;

// A thread for each dimension, 16 rows on their way at a time.
static_assert(kThreads == kSlice, "load_tile");
template <class T, class RowOf>
INLINE void load_tile_of(float* to, const T* from, int rows, int n, RowOf row_of) {
  const int i = threadIdx.x;
#pragma unroll 16
  for (int j = 0; j < rows; ++j) {
    const int64_t row = row_of(j);
    to[j * kRow + i] = i < n && row >= 0 ? to_float(from[row + i]) : 0.0f;
  }
}

// to[j][i] = element row_of(j) + i of data, i < n; zeros past n, and in rows that are negative.
template <class RowOf>
INLINE void load_tile(float* to, const void* data, int32_t kind, int rows, int n, RowOf row_of) {
  if (kind == kF32)
    load_tile_of(to, static_cast<const float*>(data), rows, n, row_of);
  else if (kind == kF16)
    load_tile_of(to, static_cast<const half_t*>(data), rows, n, row_of);
  else if (kind == kBf16)
    load_tile_of(to, static_cast<const bfloat_t*>(data), rows, n, row_of);
  else
    load_tile_of(to, static_cast<const int8_t*>(data), rows, n, row_of);
}

template <int kEach>
struct FlashMemory {  // dynamic shared memory
  static constexpr int kVectors = kGroups * kEach;
  float* q;   // [kVectors][kRow]
  float* kv;  // [kBlockKeys][kRow]
  float* p;   // [kVectors][kWeights], negative for a hidden key
  INLINE explicit FlashMemory(uint8_t* bytes)
      : q(reinterpret_cast<float*>(bytes)), kv(q + kVectors * kRow), p(kv + kBlockKeys * kRow) {}
};

// This thread's part of its group's states; kWide: columns of o that a block has.
template <int kEach, int kWide>
struct Flash {
  static constexpr int kColumns = kWide / kLanes;
  float m[kEach], l[kEach], o[kEach][kColumns];

  static INLINE int lane() { return threadIdx.x % kLanes; }
  static INLINE int vector(int r) { return threadIdx.x / kLanes * kEach + r; }
  static INLINE int key(int t) { return kLanes * t + lane(); }
  static INLINE int column(int i) { return i / 4 * 64 + 4 * lane() + i % 4; }

  INLINE void clear() {
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      m[r] = -INFINITY_F, l[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) o[r][i] = 0.0f;
    }
  }

  // dots[r][t] += vector(r) . key(t) over n dimensions.
  static INLINE void add_dots(const FlashMemory<kEach>& at, int n, float (&dots)[kEach][kTiles]) {
#pragma unroll 2
    for (int d = 0; d < n; d += 4) {
      float4 q[kEach], k[kTiles];
#pragma unroll
      for (int r = 0; r < kEach; ++r)
        q[r] = *reinterpret_cast<const float4*>(at.q + vector(r) * kRow + d);
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        k[t] = *reinterpret_cast<const float4*>(at.kv + key(t) * kRow + d);
#pragma unroll
      for (int r = 0; r < kEach; ++r)
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          float x = fma_rn(q[r].x, k[t].x, dots[r][t]);
          x = fma_rn(q[r].y, k[t].y, x);
          x = fma_rn(q[r].z, k[t].z, x);
          dots[r][t] = fma_rn(q[r].w, k[t].w, x);
        }
    }
  }

  // Scores become weights in shared memory, as weigh(r, t, weight) changes them. Bit t of
  // visible[r]: key(t) is seen. The states move to their new m.
  template <class Weigh>
  INLINE void soften(const FlashMemory<kEach>& at, const float (&s)[kEach][kTiles],
                     const uint32_t (&visible)[kEach], Weigh weigh) {
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const uint32_t votes = __ballot_sync(0xffffffffu, visible[r] != 0);
      const bool any = (votes >> (threadIdx.x & 16) & 0xffff) != 0;
      float top = -INFINITY_F;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        if (visible[r] >> t & 1) top = max_num(top, s[r][t]);
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        top = max_num(top, __shfl_xor_sync(0xffffffffu, top, offset));
      if (any) {
        const float next = m[r] > top ? m[r] : top, change = exp_rn(sub_rn(m[r], next));
        m[r] = next;
        l[r] = mul_rn(l[r], change);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) o[r][i] = mul_rn(o[r][i], change);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const bool is_visible = visible[r] >> t & 1;
        const float weight = is_visible ? exp_rn(sub_rn(s[r][t], m[r])) : 0.0f;
        l[r] = add_rn(l[r], weight);
        at.p[vector(r) * kWeights + key(t)] = is_visible ? weigh(r, t, weight) : -1.0f;
      }
    }
  }

  // o += weights times values over keys [low, high) of the block; nobody sees others.
  INLINE void add_values(const FlashMemory<kEach>& at, int low, int high) {
    for (int j = low / 4 * 4; j < high; j += 4) {
      float4 p[kEach];
#pragma unroll
      for (int r = 0; r < kEach; ++r)
        p[r] = *reinterpret_cast<const float4*>(at.p + vector(r) * kWeights + j);
      add_value(at.kv + j * kRow, p, [](const float4& x) { return x.x; });
      add_value(at.kv + (j + 1) * kRow, p, [](const float4& x) { return x.y; });
      add_value(at.kv + (j + 2) * kRow, p, [](const float4& x) { return x.z; });
      add_value(at.kv + (j + 3) * kRow, p, [](const float4& x) { return x.w; });
    }
  }

  template <class Weight>
  INLINE void add_value(const float* row, const float4 (&p)[kEach], Weight weight_of) {
    float v[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; i += 4)
      *reinterpret_cast<float4*>(v + i) = *reinterpret_cast<const float4*>(row + column(i));
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const float weight = weight_of(p[r]);
      if (weight < 0.0f) continue;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) o[r][i] = fma_rn(weight, v[i], o[r][i]);
    }
  }

  // This state, of earlier chunks, then `part`.
  INLINE void merge(const Flash& part) {
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const Factors by = join<ExactPart>(m[r], part.m[r]);
      l[r] = joined(l[r], part.l[r], by);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) o[r][i] = joined(o[r][i], part.o[r][i], by);
    }
  }

  // State of vector r into memory, o from column `first` on; threads past dv write nothing.
  INLINE void store(int r, float* state, int32_t first, int32_t dv) const {
    if (lane() == 0) state[0] = m[r];
    state[1 + lane()] = l[r];
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (first + column(i) < dv) state[1 + kLanes + first + column(i)] = o[r][i];
  }
};
