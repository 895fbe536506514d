// The vocabulary kernels over sixteen lanes; included once by each ISA's file, after its lanes
// header. Every sum is the chain that vocab.h states, whatever the blocking.
#pragma once
#include "base/counts.h"
#include "base/spans.h"
#include "vocab/sum_products.h"
#include "vocab/vocab.h"

namespace bitnet {
namespace {

// Rows of the table by rows of x whose accumulators stay in registers.
constexpr int kTileTable = kLaneRegisters >= 32 ? 4 : 1;
constexpr int kTileX = 6;
constexpr int kStreamX = kLaneRegisters >= 32 ? 6 : 3;  // beside two rows of the table

BITNET_INLINE void finish(const Projection& p, int64_t m, int64_t v, F16 lanes) {
  float y = reduce_add(lanes);
  if (p.scales) y = y * p.scales[v];
  if (p.bias) y = y + p.bias[v];
  p.out[m * p.out_stride + v] = one_nan(y);
}

// --- few rows of x: the table streams past ----------------------------------------------------
// acc[n][c] += table row n . x row c
template <int N, int C, class Row>
BITNET_INLINE void dot_stream(const Row (&rows)[N], const float* x, int64_t x_stride, int64_t width,
                              F16 (&acc)[N][C]) {
  each_span(width, [&](int64_t i, auto span) {
    F16 w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      // One kilobyte ahead, for two rows: one alone the hardware follows better by itself.
      if constexpr (N > 1) __builtin_prefetch(reinterpret_cast<const char*>(rows[n].p + i) + 1024);
      w[n] = rows[n].at(i, span);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const F16 v = load(x + c * x_stride + i, span);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[n][c] = fma(w[n], v, acc[n][c]);
    }
  });
}

template <int N, int C, class RowAt>
BITNET_INLINE void stream_tile(const Projection& p, int64_t v, int64_t m, RowAt row_at) {
  decltype(row_at(0)) rows[N];
  F16 acc[N][C];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    rows[n] = row_at(v + n);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[n][c] = zero();
  }
  dot_stream<N, C>(rows, p.x + m * p.x_stride, p.x_stride, p.width, acc);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) finish(p, m + c, v + n, acc[n][c]);
}

template <int N, class RowAt>
BITNET_INLINE void stream_rows(const Projection& p, int64_t v, RowAt row_at) {
  int64_t m = 0;
  for (; m + kStreamX <= p.rows; m += kStreamX) stream_tile<N, kStreamX>(p, v, m, row_at);
  if (m < p.rows)
    with_count<kStreamX>(p.rows - m, [&]<int C> { stream_tile<N, C>(p, v, m, row_at); });
}

void project_few(const Projection& p, int64_t begin, int64_t end) {
  with_rows(p.table, p.dtype, p.table_stride, [&](auto row_at) {
    int64_t v = begin;
    // Two rows at once are two streams, which cost half of the read bandwidth, and pay from the
    // third row of x on.
    if (p.rows > 2)
      for (; v + 2 <= end; v += 2) stream_rows<2>(p, v, row_at);
    for (; v < end; ++v) stream_rows<1>(p, v, row_at);
  });
}

// --- many rows of x: a panel of the table in cache --------------------------------------------
// One block of depth [from, to) of a tile; `lanes` holds its sums between blocks, [N][C][16] with
// `gap` floats from one table row to the next.
template <int N, int C>
void tile_block(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t from,
                int64_t to, float* lanes, int64_t gap) {
  F16 acc[N][C];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[n][c] = from ? load(lanes + n * gap + c * 16) : zero();
  each_span(to - from, [&](int64_t i, auto span) {
    F16 row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = load(w + n * w_stride + from + i);  // padded with zeros
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const F16 v = load(x + c * x_stride + from + i, span);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[n][c] = fma(row[n], v, acc[n][c]);
    }
  });
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(lanes + n * gap + c * 16, acc[n][c]);
}

void project_many(const Projection& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t padded = padded_width(p.width), count = end - begin;
  float* panel = scratch;                        // [count][padded]
  float* lanes = scratch + kPanelRows * padded;  // [count][kChunkRows][16]
  constexpr int64_t gap = kChunkRows * 16;
  with_rows(p.table, p.dtype, p.table_stride, [&](auto row_at) {
    for (int64_t n = 0; n < count; ++n) {
      const auto row = row_at(begin + n);
      float* wide = panel + n * padded;
      each_span(p.width, [&](int64_t i, auto span) { store(wide + i, row.at(i, span)); });
    }
  });
  for (int64_t chunk = 0; chunk < p.rows; chunk += kChunkRows) {
    const int64_t rows = p.rows - chunk < kChunkRows ? p.rows - chunk : kChunkRows;
    for (int64_t from = 0; from < p.width; from += kDepthBlock) {
      const int64_t to = from + kDepthBlock < p.width ? from + kDepthBlock : p.width;
      for (int64_t m = 0; m < rows; m += kTileX) {
        const float* x = p.x + (chunk + m) * p.x_stride;
        float* sums = lanes + m * 16;
        with_count<kTileX>(rows - m, [&]<int C> {
          int64_t n = 0;
          for (; n + kTileTable <= count; n += kTileTable)
            tile_block<kTileTable, C>(panel + n * padded, padded, x, p.x_stride, from, to,
                                      sums + n * gap, gap);
          for (; n < count; ++n)
            tile_block<1, C>(panel + n * padded, padded, x, p.x_stride, from, to, sums + n * gap,
                             gap);
        });
      }
    }
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < count; ++n)
        finish(p, chunk + m, begin + n, load(lanes + n * gap + m * 16));
  }
}

// --- the largest k ----------------------------------------------------------------------------
// A key orders like (value, then lower id first): the value's bits made to ascend, NaN at 0, -0 as
// 0; below them the id's complement. Keys differ, so there is one answer.
BITNET_INLINE uint64_t key_of(float x, int64_t id) {
  uint32_t b = 0;
  if (x == x) {
    const float y = x + 0.0f;
    __builtin_memcpy(&b, &y, 4);
    b ^= b >> 31 ? 0xffffffffu : 0x80000000u;
  }
  return uint64_t(b) << 32 | uint32_t(~uint32_t(id));
}
BITNET_INLINE int64_t id_of(uint64_t key) { return int64_t(uint32_t(~uint32_t(key))); }

// keys[0, size) is a heap with its least key on top, but for place `hole`, which takes `key`.
BITNET_INLINE void sift_down(uint64_t* keys, int64_t size, int64_t hole, uint64_t key) {
  for (int64_t child; (child = 2 * hole + 1) < size; hole = child) {
    if (child + 1 < size && keys[child + 1] < keys[child]) ++child;
    if (key <= keys[child]) break;
    keys[hole] = keys[child];
  }
  keys[hole] = key;
}

void topk(const float* x, int64_t n, int64_t k, uint64_t* keys, int32_t* ids, float* values) {
  for (int64_t i = 0; i < k; ++i) keys[i] = key_of(x[i], i);
  for (int64_t i = k / 2; i-- > 0;) sift_down(keys, k, i, keys[i]);
  float least = x[id_of(keys[0])];
  // Later ids lose ties: only what is strictly above the least kept value, or any number while
  // that is NaN, comes in.
  each_span(n - k, [&](int64_t i, auto span) {
    const F16 v = keep(load(x + k + i, span), set1(__builtin_nanf("")), span);
    uint32_t above = ~(mask_bits(le(v, set1(least))) | mask_bits(is_nan(v))) & 0xffffu;
    for (; above; above &= above - 1) {
      const int64_t id = k + i + __builtin_ctz(above);
      const uint64_t key = key_of(x[id], id);
      if (key > keys[0]) sift_down(keys, k, 0, key);
    }
    least = x[id_of(keys[0])];
  });
  for (int64_t size = k; size > 0; --size) {  // the least goes last
    const int64_t id = id_of(keys[0]);
    ids[size - 1] = int32_t(id);
    values[size - 1] = x[id];
    sift_down(keys, size - 1, 0, keys[size - 1]);
  }
}

// --- int8 copy of a table ---------------------------------------------------------------------
void quantise(const void* table, Dtype dtype, int64_t stride, int64_t width, int8_t* q,
              float* scales, int64_t begin, int64_t end) {
  with_rows(table, dtype, stride, [&](auto row_at) {
    for (int64_t v = begin; v < end; ++v) {
      const auto row = row_at(v);
      I16 top = set1_int(0);
      each_span(width, [&](int64_t i, auto span) { top = max(top, bits(abs(row.at(i, span)))); });
      const int32_t top_bits = reduce_max(top);
      const float scale = top_bits < 0x7f800000 ? as_float(top_bits) / 127.0f : __builtin_nanf("");
      // A scale of 0 (all zeros, or subnormals too small for one) gives zeros, not 0 / 0.
      const F16 divisor = set1(scale == 0.0f ? __builtin_inff() : scale);
      each_span(width, [&](int64_t i, auto span) {
        store_i8(q + v * width + i, div(row.at(i, span), divisor), span);
      });
      scales[v] = scale;
    }
  });
}

}  // namespace
}  // namespace bitnet

#define BITNET_VOCAB_KERNELS(isa) \
  {#isa, kStreamX + 1, project_few, project_many, topk, quantise, sum_products}
