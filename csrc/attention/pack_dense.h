// Rows of dense arrays in the order that blocks.h reads, and their way from memory. Include a lanes
// header and attention/blocks.h first.
#pragma once
#include "attention/dense.h"
#include "base/spans.h"

namespace bitnet {
namespace {

// Sixteen rows of 32-bit units, those from `rows` on zero, become a tile [units][16].
template <class At>
BITNET_INLINE void pack_tile(At at, int rows, int32_t units, float* to) {
  each_span(units, [&](int64_t u, auto span) {
    F16 x[16];
    for (int j = 0; j < 16; ++j) x[j] = j < rows ? at(j).at(u, span) : zero();
    transpose(x);
    const int n = units - u < 16 ? int(units - u) : 16;
    for (int i = 0; i < n; ++i) store(to + (u + i) * 16, x[i]);
  });
}

BITNET_INLINE int tile_lanes(int n, int tile) {
  const int rest = n - 16 * tile;
  return rest < 0 ? 0 : rest < 16 ? rest : 16;
}

// Rows [start, start + n), n <= 64, of `width` elements in tiles [4][width][16]; the rest zero.
BITNET_INLINE void pack_tiles(const DenseRows& from, int64_t start, int n, int32_t width,
                              float* to) {
  with_rows(from.data, from.dtype, from.stride, [&](auto row) {
    for (int tile = 0; tile < kPageTiles; ++tile)
      pack_tile([&](int j) { return row(start + 16 * tile + j); }, tile_lanes(n, tile), width,
                to + int64_t(tile) * width * 16);
  });
}

// n rows of `width` elements, zero up to `wide`; returns whether all are finite.
template <class At>
BITNET_INLINE bool pack_rows(At at, int n, int32_t width, int32_t wide, float* to) {
  uint32_t bad = 0;
  const F16 infinity = set1(__builtin_inff());
  for (int j = 0; j < n; ++j) {
    const auto row = at(j);
    each_span(width, [&](int64_t d, auto span) {
      const F16 x = row.at(d, span);
      bad |= ~mask_bits(lt(abs(x), infinity)) & 0xffffu;
      store(to + int64_t(j) * wide + d, x);
    });
  }
  return bad == 0;
}

BITNET_INLINE void prefetch_bytes(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += BITNET_LINE)
    __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}
BITNET_INLINE void prefetch_row(const DenseTask& t, int64_t row) {
  if (row >= t.keys) return;
  const int64_t k = t.k.dtype == Dtype::f32 ? 4 : 2, v = t.v.dtype == Dtype::f32 ? 4 : 2;
  prefetch_bytes(static_cast<const char*>(t.k.data) + row * t.k.stride * k, t.dk * k);
  prefetch_bytes(static_cast<const char*>(t.v.data) + row * t.v.stride * v, t.dv * v);
}

// Where rows from `start` on lie, to fetch their cache lines to cache level 1 or 2.
struct Lines {
  const char* first;
  int64_t row, lane;  // bytes from a row or lane to the next

  BITNET_INLINE Lines(const DenseRows& from, int64_t start) {
    lane = from.dtype == Dtype::f32 ? 4 : 2;
    row = from.stride * lane;
    first = static_cast<const char*>(from.data) + start * row;
  }
  BITNET_INLINE const char* at(int64_t j, int64_t d) const { return first + j * row + d * lane; }
  BITNET_INLINE void fetch(int64_t j, int64_t d) const { __builtin_prefetch(at(j, d), 0, 2); }
  // Those of rows [j, j + N).
  template <int N, int Level>
  BITNET_INLINE void fetch_rows(int64_t j, int64_t d) const {
    const char* p = at(j, d);
    for (int i = 0; i < N; ++i, p += row) {
      __asm__("" : "+r"(p));  // else a loop holds N addresses, on the stack
      __builtin_prefetch(p, 0, 4 - Level);
    }
  }
};

// Rows of keys and values that come from memory while those before them are worked on.
struct Ahead {
  Lines keys, values;

  // The block after the one at `start`; that one itself where it is the last.
  BITNET_INLINE Ahead(const DenseTask& t, int64_t start)
      : keys(t.k, next(t, start)), values(t.v, next(t, start)) {}
  static BITNET_INLINE int64_t next(const DenseTask& t, int64_t start) {
    return start + 2 * kPageTokens <= t.keys ? start + kPageTokens : start;
  }
};

}  // namespace
}  // namespace bitnet
