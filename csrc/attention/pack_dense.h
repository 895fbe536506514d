// A task's queries, and 64 keys and values at a time, in the order that blocks.h reads. Include a
// lanes header, attention/append.h (int8_scale) and attention/blocks.h first.
#pragma once
#include "attention/dense.h"
#include "base/spans.h"

namespace bitnet {
namespace {

// One block of keys and the task's queries, in scratch.
struct Packed {
  float* keys;          // [4][dk][16]; int8: pairs of int16 [4][wide_dk / 2][16]
  float* values;        // [64][wide_dv], zero past dv
  float* key_scales;    // [64], int8 only
  float* queries;       // [count][wide_dk]; int8: pairs in the first half of each
  float* query_scales;  // [count], int8 only
  int32_t wide_dk, wide_dv;
  bool finite;  // all values of the block

  BITNET_INLINE Packed(const DenseTask& t, float* scratch)
      : wide_dk((t.dk + 15) / 16 * 16), wide_dv((t.dv + 15) / 16 * 16), finite(true) {
    keys = scratch;
    values = keys + kPageTokens * wide_dk;
    key_scales = values + kPageTokens * wide_dv;
    queries = key_scales + kPageTokens;
    query_scales = queries + int64_t(t.count) * wide_dk;
  }
  BITNET_INLINE auto value_rows() const { return rows_at(values, wide_dv); }
};

// x[0, n) -> pairs of int16 codes: unit u holds elements u (low half) and u + wide / 2, zero past
// n. Returns the scale that gives x back; NaN or infinity in x make it NaN. |code| <= 127, so a dot
// product of 1024 is below 2^24: exact as a float too. Room: x wide + 16, pairs wide.
BITNET_INLINE float quantise(float* x, int32_t n, int32_t wide, int32_t* pairs) {
  const Int8Scale scale = int8_scale(x, n);
  for (int32_t i = n; i < wide + 16; ++i) x[i] = 0.0f;
  const F16 multiply = set1(scale.multiply);
  const int32_t units = wide / 2;
  for (int32_t u = 0; u < units; u += 16) {
    const I16 low = to_int(mul(load(x + u), multiply));
    const I16 high = to_int(mul(load(x + units + u), multiply));
    store_int(pairs + u, bit_or(bit_and(low, set1_int(0xffff)), shift_left<16>(high)));
  }
  return scale.stored;
}

template <class Row>
BITNET_INLINE void widen_row(const Row& row, int32_t n, float* to) {
  each_span(n, [&](int64_t i, auto span) { store(to + i, row.at(i, span), span); });
}

void pack_queries(const DenseTask& t, const Packed& to) {
  alignas(64) float wide[kMaxHeadDim + 16];
  with_rows(t.q.data, t.q.dtype, 1, [&](auto at) {
    for (int32_t i = 0; i < t.count; ++i) {
      const int64_t v = t.first + i;
      const auto row = at(v / t.group * t.q.stride + v % t.group * t.q.head_stride);
      float* query = to.queries + int64_t(i) * to.wide_dk;
      widen_row(row, t.dk, t.int8 ? wide : query);
      if (t.int8)
        to.query_scales[i] = quantise(wide, t.dk, to.wide_dk, reinterpret_cast<int32_t*>(query));
    }
  });
}

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

// Keys [start, start + n), n <= 64; the rest of the block zero.
void pack_keys(const DenseTask& t, int64_t start, int n, const Packed& to) {
  if (!t.int8) return pack_tiles(t.k, start, n, t.dk, to.keys);
  with_rows(t.k.data, t.k.dtype, t.k.stride, [&](auto row) {
    const int32_t units = to.wide_dk / 2;
    for (int tile = 0; tile < kPageTiles; ++tile) {
      const int rows = tile_lanes(n, tile);
      alignas(64) float wide[kMaxHeadDim + 16];
      alignas(64) int32_t pairs[16 * kMaxHeadDim];
      for (int j = 0; j < rows; ++j) {
        widen_row(row(start + 16 * tile + j), t.dk, wide);
        to.key_scales[16 * tile + j] = quantise(wide, t.dk, to.wide_dk, pairs + j * to.wide_dk);
      }
      for (int j = rows; j < 16; ++j) to.key_scales[16 * tile + j] = 0.0f;
      const auto* moved = reinterpret_cast<const float*>(pairs);  // bits only
      pack_tile([&](int j) { return F32Row{moved + j * to.wide_dk}; }, rows, units,
                to.keys + int64_t(tile) * units * 16);
    }
  });
}

void pack_values(const DenseTask& t, int64_t start, int n, Packed& to) {
  with_rows(t.v.data, t.v.dtype, t.v.stride, [&](auto row) {
    to.finite = pack_rows([&](int j) { return row(start + j); }, n, t.dv, to.wide_dv, to.values);
  });
  for (int64_t i = int64_t(n) * to.wide_dv; i < kPageTokens * to.wide_dv; i += 16)
    store(to.values + i, zero());
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

}  // namespace
}  // namespace bitnet
