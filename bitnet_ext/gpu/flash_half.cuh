// Attention of a warp's 16 query vectors over blocks of 64 keys on the matrix units, after
// FlashAttention-2 (arXiv:2307.08691): operands in half precision, sums and softmax in float32.
//
//   S  = Q K^T                          m16n8k16, dk in ascending steps of 16
//   m' = max(m, scale max S),  c = 2^(m - m'),  P = 2^(scale S - m')      scale includes log2 e
//   l  = l c + sum P                    4 partial sums: thread t of a row's four has keys
//                                       8 n + 2 t and 8 n + 2 t + 1
//   O  = O c + P V                      m16n8k16, keys in ascending steps of 16; P rounded to T
//
// A hidden key has S = -inf and P = 0, and its value is multiplied by that 0: it must be finite.
// Vectors share nothing but instructions, and a block that a vector does not see leaves its state
// as it is, so a vector's bits do not depend on what stands beside it.
//
// With lane = 4 g + t a thread holds rows g and g + 8, columns 2 t and 2 t + 1 of each tile of 8
// (mma.cuh). K and V stand in shared memory as T [64][kWidth], the 16-byte words of row j at word
// index ^ (j % 8), so that the 8 rows of a matrix lie in different banks.
#pragma once
#include "merge.cuh"
#include "mma.cuh"

constexpr int kBlockKeys = 64, kWarpVectors = 16;

template <int kWidth>
INLINE int word_offset(int row, int word) {  // in bytes
  return row * kWidth * 2 + ((word ^ (row & 7)) << 4);
}

// A thread's part of its warp's states.
template <class T, int kWidth>
struct HalfFlash {
  static constexpr int kSteps = kWidth / 16, kColumnTiles = kWidth / 8, kKeyTiles = kBlockKeys / 8;
  float m[2], l[2], o[kColumnTiles][4];  // rows g, g + 8

  static INLINE int lane() { return threadIdx.x % 32; }
  static INLINE int vector(int h) { return lane() / 4 + 8 * h; }
  static INLINE int column(int n, int e) { return 8 * n + lane() % 4 * 2 + e; }

  INLINE void clear() {
    m[0] = m[1] = -INFINITY_F;
    l[0] = l[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;
  }

  // Keys [start, start + 64); row h sees [low[h], high[h]).
  INLINE void visit(const uint8_t* keys, const uint8_t* values, const uint32_t (&q)[kSteps][4],
                    float scale, int32_t start, const int32_t (&low)[2], const int32_t (&high)[2]) {
    float s[kKeyTiles][4];
    score(keys, q, s);
    add(s, values, {scale, scale}, start, low, high);
  }

  // The same of scores; row h has scale[h].
  INLINE void add(float (&s)[kKeyTiles][4], const uint8_t* values, const float (&scale)[2],
                  int32_t start, const int32_t (&low)[2], const int32_t (&high)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (start < low[h] || start + kBlockKeys > high[h])
        hide(s, h, low[h] - start, high[h] - start);
      soften(s, h, scale[h]);
    }
    add_values(values, s);
  }

  static INLINE void score(const uint8_t* keys, const uint32_t (&q)[kSteps][4],
                           float (&s)[kKeyTiles][4]) {
    const int matrix = lane() / 8, row = lane() % 8;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        const int key = 8 * (n + matrix / 2) + row;
        uint32_t k[4];
        load_matrices(k, keys + word_offset<kWidth>(key, 2 * step + matrix % 2));
        mma_half<T>(s[n], q[step], {k[0], k[1]});
        mma_half<T>(s[n + 1], q[step], {k[2], k[3]});
      }
  }

  static INLINE void hide(float (&s)[kKeyTiles][4], int h, int32_t low, int32_t high) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (column(n, e) < low || column(n, e) >= high) s[n][2 * h + e] = -INFINITY_F;
  }

  INLINE void soften(float (&s)[kKeyTiles][4], int h, float scale) {
    float top = -INFINITY_F;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) top = max_num(top, max_num(s[n][2 * h], s[n][2 * h + 1]));
    top = max_num(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = max_num(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float next = max_num(m[h], mul_rn(top, scale));
    const float shift = next == -INFINITY_F ? 0.0f : next;
    const float change = exp2_approx(sub_rn(m[h], shift));
    m[h] = next;
    l[h] = mul_rn(l[h], change);
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float p = exp2_approx(fma_rn(s[n][2 * h + e], scale, -shift));
        l[h] = add_rn(l[h], p);
        s[n][2 * h + e] = p;
      }
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      o[n][2 * h] = mul_rn(o[n][2 * h], change);
      o[n][2 * h + 1] = mul_rn(o[n][2 * h + 1], change);
    }
  }

  INLINE void add_values(const uint8_t* values, const float (&p)[kKeyTiles][4]) {
    const int matrix = lane() / 8, row = lane() % 8;
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      // Two tiles of D, side by side, are an A of 16 columns.
      const uint32_t weights[4] = {pack_pair<T>(p[n][0], p[n][1]), pack_pair<T>(p[n][2], p[n][3]),
                                   pack_pair<T>(p[n + 1][0], p[n + 1][1]),
                                   pack_pair<T>(p[n + 1][2], p[n + 1][3])};
      const int key = 8 * (n + matrix % 2) + row;
#pragma unroll
      for (int c = 0; c < kColumnTiles; c += 2) {
        uint32_t v[4];
        load_matrices_transposed(v, values + word_offset<kWidth>(key, c + matrix / 2));
        mma_half<T>(o[c], weights, {v[0], v[1]});
        mma_half<T>(o[c + 1], weights, {v[2], v[3]});
      }
    }
  }
};

// The merged states of a warp's earlier chunks. o stands in shared memory, where nobody else
// touches it: two states would not fit the registers.
template <class T, int kWidth>
struct HalfTotal {
  using Part = HalfFlash<T, kWidth>;
  static constexpr int kEach = 4 * Part::kColumnTiles;  // floats of o that a thread has
  float m[2], l[2];
  float* o;  // element i at o[32 * i]

  // memory: float [warps][kEach][32]
  INLINE explicit HalfTotal(uint8_t* memory)
      : o(reinterpret_cast<float*>(memory) + threadIdx.x / 32 * 32 * kEach + Part::lane()) {
    m[0] = m[1] = -INFINITY_F;
    l[0] = l[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) o[32 * i] = 0.0f;
  }

  // Then `part`, of the next chunk.
  INLINE void merge(const Part& part) {
    Factors by[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      by[h] = join<HalfPart>(m[h], part.m[h]);
      l[h] = joined(l[h], part.l[h], by[h]);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float& sum = o[32 * i];
      sum = joined(sum, part.o[i / 4][i % 4], by[i / 2 % 2]);
    }
  }

  INLINE void store(int h, float* state, int32_t dv) const {
    if (Part::lane() % 4 == 0) state[0] = m[h];
    state[1 + Part::lane() % 4] = l[h];
    each(h, dv, 1.0f, [state](int32_t d, float x) { state[1 + HalfPart::kLanes + d] = x; });
  }

  // write(d, o[d] / sum) of row h, for this thread's columns d < dv.
  template <class Write>
  INLINE void each(int h, int32_t dv, float sum, Write write) const {
#pragma unroll
    for (int n = 0; n < Part::kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int d = Part::column(n, e);
        if (d < dv) write(d, divided(o[32 * (4 * n + 2 * h + e)], sum));
      }
  }
};
