// Projections, of which the one on the vocabulary is the largest, with the CPU's bits
// (csrc/vocab/vocab.h):
//
//   out[m][v] = (sum over e of x[m][e] * table[v][e]) * scales[v] + bias[v] + residual[m][v]
//
// The sum is sixteen chains of fused multiply-adds (chain = e mod 16, e
// ascending) and one tree. A thread holds eight chains of a row, its neighbour
// the other eight: so every 16 bytes of a bf16 row are one thread's, no chain
// ever changes hands, and the order is the same for any number of rows on
// either side.
//
// project is for few rows of x, project_many for many. In the first, a block
// multiplies a tile of 64 kEach table rows by kColumns rows of x. Slices of kSlice elements of the
// tile pass through a ring in shared memory, copied while others are multiplied; with one column
// the table is read once, at the rate of the memory.
#include "async.cuh"

constexpr int kThreads = 128;
constexpr int kPairs = kThreads / 2;  // two threads a row
constexpr int kSlice = 64;            // elements of each row that a slot holds
constexpr int kSlots = 4;

INLINE void finish(float y, int m, int v, const float* scales, const float* bias,
                   const float* residual, float* out, int vocab) {
  const int64_t at = int64_t(m) * vocab + v;
  if (scales) y = mul_rn(y, scales[v]);
  if (bias) y = add_rn(y, bias[v]);
  y = one_nan(y);
  out[at] = residual ? add_rn(y, residual[at]) : y;
}

// ---- eight neighbouring elements of a row, to float32

INLINE void load_eight(const float* p, float (&w)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 four = reinterpret_cast<const float4*>(p)[i];
    w[4 * i] = four.x, w[4 * i + 1] = four.y, w[4 * i + 2] = four.z, w[4 * i + 3] = four.w;
  }
}

template <class T>
INLINE void halves(uint32_t pair, float& low, float& high) {
  low = to_float(T{uint16_t(pair)});
  high = to_float(T{uint16_t(pair >> 16)});
}

template <class T>  // half_t, bfloat_t
INLINE void load_eight(const T* p, float (&w)[8]) {
  const uint4 words = *reinterpret_cast<const uint4*>(p);
  halves<T>(words.x, w[0], w[1]);
  halves<T>(words.y, w[2], w[3]);
  halves<T>(words.z, w[4], w[5]);
  halves<T>(words.w, w[6], w[7]);
}

// A byte q + 128 under the exponent of 2^23 is the float 2^23 + q + 128.
INLINE void load_eight(const int8_t* p, float (&w)[8]) {
  const uint2 words = *reinterpret_cast<const uint2*>(p);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t bytes = (i < 4 ? words.x : words.y) ^ 0x80808080u;
    const uint32_t bits = __byte_perm(bytes, 0x4b000000u, 0x7440u + (i & 3));
    w[i] = sub_rn(__uint_as_float(bits), 8388736.0f);
  }
}

// ---- shared memory

// Bytes from one row of a slot to the next: eight neighbouring threads read
// from all 32 banks.
template <class T>
constexpr int kPitch = kSlice * sizeof(T) + (sizeof(T) == 1 ? 16 : 32);

// A slot: rows of the table, then rows of x.
template <class T, int kEach, int kColumns>
constexpr int kSlotBytes = kPairs * kEach * kPitch<T> + kColumns * kSlice * 4;

template <class T>
struct Tile {
  const T* table;  // [V][stride], rows on 16 bytes, zeros from `width` to a
                   // multiple of 16
  int64_t stride;
  const float* x;  // [rows][width]
  int width, padded;
  int vocab, rows;
  int first_row, first_column;
};

// Start copying slice `slice` of the tile's table rows.
template <class T, int kEach>
INLINE void copy_rows(const Tile<T>& tile, int slice, uint8_t* slot) {
  constexpr int kPieces = kSlice * sizeof(T) / 16;  // of a row
#pragma unroll
  for (int i = 0; i < kPairs * kEach * kPieces / kThreads; ++i) {
    const int at = i * kThreads + threadIdx.x, row = at / kPieces, piece = at % kPieces;
    const int v = tile.first_row + row, e = slice * kSlice + piece * (16 / int(sizeof(T)));
    const bool valid = v < tile.vocab && e < tile.padded;
    const T* from = valid ? tile.table + v * tile.stride + e : tile.table;
    copy_async(slot + row * kPitch<T> + piece * 16, from, valid);
  }
}

template <int kColumns>
constexpr int kHeld = (kColumns * kSlice + kThreads - 1) / kThreads;  // numbers of x a thread

// This thread's share of slice `slice` of x: zeros past the width, and past the
// last row.
template <class T, int kColumns>
INLINE void load_x(const Tile<T>& tile, int slice, float (&held)[kHeld<kColumns>]) {
#pragma unroll
  for (int i = 0; i < kHeld<kColumns>; ++i) {
    const int at = i * kThreads + threadIdx.x, column = tile.first_column + at / kSlice;
    const int e = slice * kSlice + at % kSlice;
    const bool valid = at < kColumns * kSlice && column < tile.rows && e < tile.width;
    held[i] = valid ? tile.x[int64_t(column) * tile.width + e] : 0.0f;
  }
}

template <class T, int kEach, int kColumns>
INLINE void store_x(const float (&held)[kHeld<kColumns>], uint8_t* slot) {
  float* x = reinterpret_cast<float*>(slot + kPairs * kEach * kPitch<T>);
#pragma unroll
  for (int i = 0; i < kHeld<kColumns>; ++i) {
    const int at = i * kThreads + threadIdx.x;
    if (at < kColumns * kSlice) x[at] = held[i];
  }
}

// sums[row][column][i] += table[row][16 s + 8 half + i] * x[column][16 s + 8
// half + i]
template <class T, int kEach, int kColumns>
INLINE void multiply(const uint8_t* slot, int s, float (&sums)[kEach][kColumns][8]) {
  const int pair = threadIdx.x / 2, element = 16 * s + 8 * (threadIdx.x & 1);
  const float* x = reinterpret_cast<const float*>(slot + kPairs * kEach * kPitch<T>) + element;
  float w[kEach][8];
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    load_eight(reinterpret_cast<const T*>(slot + (j * kPairs + pair) * kPitch<T>) + element, w[j]);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    float v[8];
    load_eight(x + c * kSlice, v);
#pragma unroll
    for (int j = 0; j < kEach; ++j)
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[j][c][i] = fma_rn(w[j][i], v[i], sums[j][c][i]);
  }
}

// The tree over sixteen chains, eight of them this thread's: 8 apart, 4, 2, 1.
INLINE float total(const float (&chains)[8]) {
  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    sum[i] = add_rn(chains[i], __shfl_xor_sync(0xffffffffu, chains[i], 1));
#pragma unroll
  for (int apart = 4; apart > 0; apart /= 2)
#pragma unroll
    for (int i = 0; i < apart; ++i) sum[i] = add_rn(sum[i], sum[i + apart]);
  return sum[0];
}

// Whether a row of the block's tile of x is.
template <int kColumns>
INLINE bool any_active(const uint8_t* active, int rows) {
  bool any = false;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int m = blockIdx.x * kColumns + c;
    any = any || (m < rows && active[m]);
  }
  return any;
}

// grid (ceil(rows / kColumns), ceil(vocab / 64 kEach)): neighbours share the
// table's tile in L2
template <class T, int kEach, int kColumns>
__global__ void __launch_bounds__(kThreads)
    project(const float* x,         // [rows][width]
            const T* table,         // [vocab][stride]
            const float* scales,    // [vocab] or null
            const float* bias,      // [vocab] or null
            const float* residual,  // [rows][vocab] or null; may be `out`
            const uint8_t* active,  // [rows] or null; rows of `out` that are not
                                    // are left alone
            float* out,             // [rows][vocab]
            int64_t stride, int width, int vocab, int rows) {
  if (active && !any_active<kColumns>(active, rows)) return;
  DYNAMIC_SHARED(ring);
  constexpr int kBytes = kSlotBytes<T, kEach, kColumns>;
  const Tile<T> tile = {table,
                        stride,
                        x,
                        width,
                        (width + 15) / 16 * 16,
                        vocab,
                        rows,
                        int(blockIdx.y) * kPairs * kEach,
                        int(blockIdx.x) * kColumns};
  const int slices = (tile.padded + kSlice - 1) / kSlice;

  float held[kHeld<kColumns>];
  for (int slice = 0; slice < kSlots - 1; ++slice) {
    uint8_t* slot = ring + slice * kBytes;
    copy_rows<T, kEach>(tile, slice, slot);
    copy_async_commit();
    load_x<T, kColumns>(tile, slice, held);
    store_x<T, kEach, kColumns>(held, slot);
  }

  float sums[kEach][kColumns][8] = {};
  for (int slice = 0; slice < slices; ++slice) {
    copy_async_wait<kSlots - 2>();
    __syncthreads();  // the slice is here for all, and the slot before it is
                      // free
    const int next = slice + kSlots - 1;
    uint8_t* free_slot = ring + next % kSlots * kBytes;
    copy_rows<T, kEach>(tile, next, free_slot);
    copy_async_commit();
    load_x<T, kColumns>(tile, next,
                        held);  // on its way while this slice is multiplied
    const uint8_t* slot = ring + slice % kSlots * kBytes;
    const int steps = (tile.padded - slice * kSlice) / 16;
    if (steps >= kSlice / 16) {
#pragma unroll
      for (int s = 0; s < kSlice / 16; ++s) multiply<T, kEach, kColumns>(slot, s, sums);
    } else {  // no step more than the CPU's: + 0 * 0 would turn -0 into 0
      for (int s = 0; s < steps; ++s) multiply<T, kEach, kColumns>(slot, s, sums);
    }
    store_x<T, kEach, kColumns>(held, free_slot);
  }
  copy_async_wait<0>();

#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int v = tile.first_row + j * kPairs + threadIdx.x / 2;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int m = tile.first_column + c;
      float y = total(sums[j][c]);
      if (v >= vocab || m >= rows || threadIdx.x % 2 || (active && !active[m])) continue;
      finish(y, m, v, scales, bias, residual, out, vocab);
    }
  }
}

// ---- many rows: a block has 32 rows of x and 64 of the table. Four threads share an output, four
// chains each; a thread has 4 x 8 outputs, so that a number from shared memory serves 10 products.

constexpr int kManyThreads = 256, kManyX = 32, kManyTable = 64, kEachX = 4, kEachTable = 8;
constexpr int kManyDepth = 32;               // elements of a row in shared memory
constexpr int kManyPitch = kManyDepth + 16;  // two neighbouring rows fill the banks once

struct alignas(16) ManySlice {
  float x[kManyX][kManyPitch], table[kManyTable][kManyPitch];
};

// Elements [e, e + 32) of the tile on their way: eight of the table, four of x.
struct ManyHeld {
  float table[8], x[4];
};

template <class T>
INLINE void load_many(const Tile<T>& tile, int e, ManyHeld& held) {
  const int v = tile.first_row + threadIdx.x / 4, at = e + threadIdx.x % 4 * 8;
  if (v < tile.vocab && at < tile.padded) {
    load_eight(tile.table + v * tile.stride + at, held.table);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) held.table[i] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = tile.first_column + i * 8 + threadIdx.x / 32, column = e + threadIdx.x % 32;
    const bool valid = m < tile.rows && column < tile.width;
    held.x[i] = valid ? tile.x[int64_t(m) * tile.width + column] : 0.0f;
  }
}

INLINE void store_many(const ManyHeld& held, ManySlice& slice) {
  float* to = slice.table[threadIdx.x / 4] + threadIdx.x % 4 * 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = held.table[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) slice.x[i * 8 + threadIdx.x / 32][threadIdx.x % 32] = held.x[i];
}

// This thread's first row of x, first row of the table, and first chain.
struct ManyPlace {
  int x, table, chain;
  INLINE ManyPlace() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp / 2 * 2 + lane / 16, table = warp % 2 * 4 + lane / 4 % 4, chain = lane % 4 * 4;
  }
};

// sums[i][j][c] += x[.][e] * table[.][e], e = 16 step + chain + c.
INLINE void multiply_many(const ManySlice& slice, const ManyPlace& own, int step,
                          float (&sums)[kEachX][kEachTable][4]) {
  const int e = 16 * step + own.chain;
  float4 x[kEachX];
#pragma unroll
  for (int i = 0; i < kEachX; ++i)
    x[i] = *reinterpret_cast<const float4*>(slice.x[own.x + 8 * i] + e);
#pragma unroll
  for (int j = 0; j < kEachTable; ++j) {
    const float4 w = *reinterpret_cast<const float4*>(slice.table[own.table + 8 * j] + e);
#pragma unroll
    for (int i = 0; i < kEachX; ++i) {
      sums[i][j][0] = fma_rn(w.x, x[i].x, sums[i][j][0]);
      sums[i][j][1] = fma_rn(w.y, x[i].y, sums[i][j][1]);
      sums[i][j][2] = fma_rn(w.z, x[i].z, sums[i][j][2]);
      sums[i][j][3] = fma_rn(w.w, x[i].w, sums[i][j][3]);
    }
  }
}

// The tree over sixteen chains, four of them this thread's: 8 apart, 4, 2, 1.
INLINE float total_of_four(const float (&chains)[4]) {
  float sum[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    sum[c] = add_rn(chains[c], __shfl_xor_sync(0xffffffffu, chains[c], 2));
    sum[c] = add_rn(sum[c], __shfl_xor_sync(0xffffffffu, sum[c], 1));
  }
  return add_rn(add_rn(sum[0], sum[2]), add_rn(sum[1], sum[3]));
}

// grid (ceil(vocab / 64) x ceil(rows / 32)), neighbours share the table's tile in L2
template <class T>
__global__ void __launch_bounds__(kManyThreads)
    project_many(const float* x,         // [rows][width]
                 const T* table,         // [vocab][stride]
                 const float* scales,    // [vocab] or null
                 const float* bias,      // [vocab] or null
                 const float* residual,  // [rows][vocab] or null; may be `out`
                 const uint8_t* active,  // [rows] or null
                 float* out,             // [rows][vocab]
                 int64_t stride, int width, int vocab, int rows) {
  __shared__ ManySlice slices[2];
  const int tiles = (rows + kManyX - 1) / kManyX;
  const Tile<T> tile = {table,
                        stride,
                        x,
                        width,
                        (width + 15) / 16 * 16,
                        vocab,
                        rows,
                        int(blockIdx.x) / tiles * kManyTable,
                        int(blockIdx.x) % tiles * kManyX};
  const ManyPlace own;
  ManyHeld held;
  load_many(tile, 0, held);
  store_many(held, slices[0]);
  float sums[kEachX][kEachTable][4] = {};
  for (int e = 0, now = 0; e < tile.padded; e += kManyDepth, now ^= 1) {
    __syncthreads();
    load_many(tile, e + kManyDepth, held);  // on its way while this slice is multiplied
    multiply_many(slices[now], own, 0, sums);
    // No step more than the CPU's: + 0 * 0 would turn -0 into 0.
    if (e + 16 < tile.padded) multiply_many(slices[now], own, 1, sums);
    store_many(held, slices[now ^ 1]);
  }
#pragma unroll
  for (int i = 0; i < kEachX; ++i)
#pragma unroll
    for (int j = 0; j < kEachTable; ++j) {
      const int m = tile.first_column + own.x + 8 * i, v = tile.first_row + own.table + 8 * j;
      const float y = total_of_four(sums[i][j]);
      if (j % 4 != threadIdx.x % 4 || m >= rows || v >= vocab || (active && !active[m])) continue;
      finish(y, m, v, scales, bias, residual, out, vocab);
    }
}
