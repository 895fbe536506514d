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
constexpr int kTileTable = kLaneRegisters >= 32 ? 4 : 2;
constexpr int kTileX = kLaneRegisters >= 32 ? 6 : 3;
constexpr int kAheadRows = 4;  // of the table, prefetched
// Rows of x up to which the table passes once, all of x from L2 beside it. A tile with few
// registers takes x from L1, where no second group of rows fits.
constexpr int64_t kFewRows = kLaneRegisters >= 32 ? 24 : kTileX;

BITNET_INLINE void finish(const Projection& p, int64_t m, int64_t v, F16 lanes) {
  float y = reduce_add(lanes);
  if (p.scales) y = y * p.scales[v];
  if (p.bias) y = y + p.bias[v];
  p.out_row(m)[v] = one_nan(y);
}

// acc[n][c] += table row n . x row c. What to prefetch lies `ahead` elements on.
template <int N, int C, class Row>
BITNET_INLINE void dot_stream(const Row (&rows)[N], int64_t ahead, const float* x, int64_t x_stride,
                              int64_t width, F16 (&acc)[N][C]) {
  each_span(width, [&](int64_t i, auto span) {
    F16 w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      // One row alone the hardware follows better by itself.
      if constexpr (N > 1) __builtin_prefetch(rows[n].p + i + ahead, 0, 2);
      w[n] = rows[n].at(i, span);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const F16 v = in_register(load(x + c * x_stride + i, span));
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
  dot_stream<N, C>(rows, kAheadRows * p.table_stride, p.x + m * p.x_stride, p.x_stride, p.width,
                   acc);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) finish(p, m + c, v + n, acc[n][c]);
}

// Table rows [v, v + count) by rows of x, N at a time.
template <int N, class RowAt>
BITNET_INLINE void stream_rows(const Projection& p, int64_t v, int64_t count, int64_t m,
                               int64_t rows, RowAt row_at) {
  with_count<kTileX>(rows, [&]<int C> {
    for (int64_t n = 0; n < count; n += N) stream_tile<N, C>(p, v + n, m, row_at);
  });
}

// The rows of x go in groups of equal size, as few as there can be. Few of them pass each tile of
// the table, which is read once from memory; of many, a group passes a panel that stays in L2.
void project(const Projection& p, int64_t begin, int64_t end) {
  const int64_t groups = (p.rows + kTileX - 1) / kTileX;
  const int64_t group = (p.rows + groups - 1) / (groups ? groups : 1);
  const int64_t panel = p.rows <= kFewRows ? kTileTable : kPanelRows;
  with_rows(p.table, p.dtype, p.table_stride, [&](auto row_at) {
    for (int64_t v = begin; v < end; v += panel) {
      const int64_t count = end - v < panel ? end - v : panel;
      // One row of x alone takes one row of the table: a single stream is the fastest.
      const int64_t tiles = p.rows > 1 ? count / kTileTable * kTileTable : 0;
      for (int64_t m = 0; m < p.rows; m += group) {
        const int64_t rows = p.rows - m < group ? p.rows - m : group;
        stream_rows<kTileTable>(p, v, tiles, m, rows, row_at);
        stream_rows<1>(p, v + tiles, count - tiles, m, rows, row_at);
      }
    }
  });
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

#define BITNET_VOCAB_KERNELS(isa) {#isa, project, topk, quantise, sum_products}
