// Gradients of attention over dense arrays, over F16; the arithmetic stands in backward.h. Include
// attention/attend_dense.h first.
#pragma once
#include "attention/attend_dense.h"
#include "attention/backward.h"

namespace bitnet {
namespace {

// Vectors [first, first + n) of the task's kv head: rows of `from`, [n][wide], zero past `width`.
// Returns whether all are finite.
bool pack_vectors(const DenseTask& t, const DenseRows& from, int64_t first, int n, int32_t width,
                  int32_t wide, float* to) {
  bool finite = true;
  with_rows(from.data, from.dtype, 1, [&](auto at) {
    const auto row = [&](int i) {
      const Vector v = vector_at(t, first + i);
      return at(v.row * from.stride + v.head * from.head_stride);
    };
    finite = pack_rows(row, n, width, wide, to);
  });
  return finite;
}

// 64 keys, and the vectors that look at them.
struct Block {
  float *keys, *values;    // tiles [4][dk][16] and [4][dv][16]
  float *queries, *d_out;  // [vectors][wide_dk] and [vectors][wide_dv]
  int32_t wide_dk, wide_dv;
};

BITNET_INLINE void pack_block(const DenseTask& t, int64_t start, const Block& to) {
  const int n = within_page(t.keys, start);
  pack_tiles(t.k, start, n, t.dk, to.keys);
  pack_tiles(t.v, start, n, t.dv, to.values);
}

// From scores s and d_out . v in g to w and ds, 0 where a key is not seen.
BITNET_INLINE void differentiate(const DenseTask& t, const float* stats, Vector v, int64_t start,
                                 uint64_t seen, const float* slopes, float* s, float* g) {
  const F16 m = set1(stats[0]), inverse = set1(stats[1]), mean = set1(stats[2]);
  const bool dropout = t.dropped > 0.0f;
  Philox random;
  if (dropout) random = random_of(t, v, start);
  for (int i = 0; i < kPageTiles; ++i) {
    const M16 lanes = seen_keys(seen, i);
    const F16 p = mul(exp(sub(load(s + 16 * i), m)), inverse);
    F16 x = load(g + 16 * i);
    if (dropout) x = drop(t, random, i, x);
    x = mul(p, sub(x, mean));
    if (t.softcap > 0.0f) x = mul(x, load(slopes + 16 * i));
    store(g + 16 * i, select(lanes, mul(x, set1(t.scale)), zero()));
    store(s + 16 * i, select(lanes, dropout ? drop(t, random, i, p) : p, zero()));
  }
}

// w and ds of R vectors, the task's from `first` on and the block's from `packed` on.
template <int R>
BITNET_INLINE void visit_backward(const BackwardTask& b, const Block& block, int64_t start,
                                  int64_t first, int packed, uint64_t* seen,
                                  float (*w)[kPageTokens], float (*ds)[kPageTokens]) {
  const DenseTask& t = b.forward;
  const float *q[R], *d_out[R];
  uint64_t any = 0;
  for (int r = 0; r < R; ++r) {
    q[r] = block.queries + int64_t(packed + r) * block.wide_dk;
    d_out[r] = block.d_out + int64_t(packed + r) * block.wide_dv;
    seen[r] = seen_by(t, vector_at(t, first + r), start);
    any |= seen[r];
  }
  if (any) {
    dots<R>(block.keys, t.dk, q, w);
    dots<R>(block.values, t.dv, d_out, ds);
  }
  const bool simple = plain(t);
  const int n = within_page(t.keys, start);
  for (int r = 0; r < R; ++r) {
    if (!seen[r]) {
      for (int i = 0; i < kPageTiles; ++i) {
        store(w[r] + 16 * i, zero());
        store(ds[r] + 16 * i, zero());
      }
      continue;
    }
    const Vector v = vector_at(t, first + r);
    alignas(64) float slopes[kPageTokens];
    seen[r] = simple ? scale_scores(t, nullptr, 1.0f, seen[r], w[r])
                     : score(t, nullptr, v, 1.0f, seen[r], start, n, w[r], slopes);
    differentiate(t, b.stats + (t.first + first + r) * kStatFloats, v, start, seen[r], slopes, w[r],
                  ds[r]);
  }
}

// m, 1 / l and D of the task's vectors, from their final states.
void backward_stats(const BackwardTask& b, const float* states) {
  const DenseTask& t = b.forward;
  with_rows(b.d_out.data, b.d_out.dtype, 1, [&](auto at) {
    for (int32_t i = 0; i < t.count; ++i, states += state_floats(t.dv)) {
      const Vector v = vector_at(t, i);
      const auto row = at(v.row * b.d_out.stride + v.head * b.d_out.head_stride);
      float* stats = b.stats + (t.first + i) * kStatFloats;
      stats[0] = stats[1] = stats[2] = 0.0f;
      if (states[1] == 0.0f) continue;
      const float sum = reduce_add(load(states + 16));
      F16 products = zero();
      each_span(t.dv, [&](int64_t d, auto span) {
        const F16 out = div(load(states + kStateHeader + d), set1(sum));
        products = fma(keep(out, zero(), span), row.at(d, span), products);
      });
      stats[0] = states[0], stats[1] = 1.0f / sum, stats[2] = reduce_add(products);
    }
  });
}

// dq of the task's vectors.
void backward_queries(const BackwardTask& b, float* scratch) {
  const DenseTask& t = b.forward;
  const int32_t wide_dk = (t.dk + 15) / 16 * 16, wide_dv = (t.dv + 15) / 16 * 16;
  Block block = {};
  block.keys = scratch, block.values = block.keys + kPageTokens * wide_dk;
  float* rows = block.values + kPageTokens * wide_dv;  // keys [64][wide_dk]
  block.queries = rows + kPageTokens * wide_dk;
  block.d_out = block.queries + int64_t(t.count) * wide_dk;
  block.wide_dk = wide_dk, block.wide_dv = wide_dv;
  float* states = block.d_out + int64_t(t.count) * wide_dv;
  const int64_t size = state_floats(t.dk);
  pack_vectors(t, t.q, 0, t.count, t.dk, wide_dk, block.queries);
  pack_vectors(t, b.d_out, 0, t.count, t.dv, wide_dv, block.d_out);
  for (int64_t i = 0; i < t.count * size; i += 16) store(states + i, zero());
  const Extent keys = keys_of(t);
  for (int64_t start = keys.low / kPageTokens * kPageTokens; start < keys.high;
       start += kPageTokens) {
    pack_block(t, start, block);
    bool finite = true;
    with_rows(t.k.data, t.k.dtype, t.k.stride, [&](auto row) {
      finite = pack_rows([&](int j) { return row(start + j); }, within_page(t.keys, start), t.dk,
                         wide_dk, rows);
    });
    for (int32_t v = 0; v < t.count; v += kSharing)
      with_count<kSharing>(t.count - v, [&]<int R> {
        alignas(64) float w[R][kPageTokens], ds[R][kPageTokens];
        uint64_t seen[R];
        float* state[R];
        for (int r = 0; r < R; ++r) state[r] = states + (v + r) * size;
        visit_backward<R>(b, block, start, v, v, seen, w, ds);
        add_seen<R>(rows_at(rows, wide_dk), wide_dk, [&] { return finite; }, seen, state, ds);
      });
  }
  for (int32_t i = 0; i < t.count; ++i) {
    const Vector v = vector_at(t, i);
    float* to = b.dq + v.row * b.dq_stride + v.head * b.dq_head;
    each_span(t.dk, [&](int64_t d, auto span) {
      store(to + d, add(load(states + i * size + kStateHeader + d), zero()), span);
    });
  }
}

// x[i][j] and x[j][i] change places.
BITNET_INLINE void transpose_block(float (*x)[kPageTokens]) {
  for (int a = 0; a < int(kPageTokens); a += 16)
    for (int c = 0; c <= a; c += 16) {
      F16 below[16], above[16];
      for (int i = 0; i < 16; ++i) below[i] = load(x[a + i] + c), above[i] = load(x[c + i] + a);
      transpose(below);
      transpose(above);
      for (int i = 0; i < 16; ++i) store(x[a + i] + c, above[i]);
      for (int i = 0; i < 16; ++i) store(x[c + i] + a, below[i]);
    }
}
BITNET_INLINE void transpose_bits(const uint64_t* x, int n, uint64_t* to) {
  for (int j = 0; j < int(kPageTokens); ++j) {
    to[j] = 0;
    for (int i = 0; i < n; ++i) to[j] |= (x[i] >> j & 1) << i;
  }
}

// sums[j] += x[j][i] rows[i] over the vectors i that see key j, for 64 keys j.
void add_transposed(const float* rows, int32_t wide, bool finite, const uint64_t* seen, int n,
                    float (*x)[kPageTokens], float* sums, int64_t size) {
  uint64_t seeing[kPageTokens];
  if (finite)
    for (uint64_t& bits : seeing) bits = key_bits(0, n);
  else
    transpose_bits(seen, n, seeing);
  for (int j = 0; j < int(kPageTokens); j += kSharing)
    with_count<kSharing>(kPageTokens - j, [&]<int R> {
      float* state[R];
      for (int r = 0; r < R; ++r) state[r] = sums + (j + r) * size;
      add_seen<R>(rows_at(rows, wide), wide, [&] { return finite; }, seeing + j, state, x + j);
    });
}

// Sums of keys [start, start + n) between the array and 64 states.
void load_sums(const float* from, int64_t stride, int n, int32_t width, float* sums, int64_t size) {
  for (int64_t i = 0; i < kPageTokens * size; i += 16) store(sums + i, zero());
  for (int j = 0; j < n; ++j)
    each_span(width, [&](int64_t d, auto span) {
      store(sums + j * size + kStateHeader + d, load(from + j * stride + d, span));
    });
}
void store_sums(const float* sums, int64_t size, int n, int32_t width, float* to, int64_t stride) {
  for (int j = 0; j < n; ++j)
    each_span(width, [&](int64_t d, auto span) {
      store(to + j * stride + d, add(load(sums + j * size + kStateHeader + d), zero()), span);
    });
}

// Vectors of the task's that position may let see one of keys [start, start + 64).
BITNET_INLINE Extent vectors_of(const DenseTask& t, int64_t start) {
  const int64_t low = start - t.right - t.offset, high = start + kPageTokens + t.left - t.offset;
  const int64_t first = (low < 0 ? 0 : low) * t.group, end = high < 0 ? 0 : high * t.group;
  return {first, start >= t.valid ? 0 : end < t.count ? end : t.count};
}

// dk and dv of keys [start, start + 64), by all vectors of the kv head.
void backward_keys(const BackwardTask& b, int64_t start, float* scratch) {
  const DenseTask& t = b.forward;
  const int32_t wide_dk = (t.dk + 15) / 16 * 16, wide_dv = (t.dv + 15) / 16 * 16;
  const int64_t dk_size = state_floats(t.dk), dv_size = state_floats(t.dv);
  Block block = {};
  block.keys = scratch, block.values = block.keys + kPageTokens * wide_dk;
  block.queries = block.values + kPageTokens * wide_dv;
  block.d_out = block.queries + kPageTokens * wide_dk;
  block.wide_dk = wide_dk, block.wide_dv = wide_dv;
  float *dk = block.d_out + kPageTokens * wide_dv, *dv = dk + kPageTokens * dk_size;
  auto* w = reinterpret_cast<float (*)[kPageTokens]>(dv + kPageTokens * dv_size);
  auto* ds = w + kPageTokens;
  const int keys = within_page(t.keys, start);
  float *dk_rows = b.dk + start * b.dk_stride, *dv_rows = b.dv + start * b.dv_stride;
  load_sums(dk_rows, b.dk_stride, keys, t.dk, dk, dk_size);
  load_sums(dv_rows, b.dv_stride, keys, t.dv, dv, dv_size);
  pack_block(t, start, block);
  const Extent vectors = vectors_of(t, start);
  for (int64_t first = vectors.low; first < vectors.high; first += kPageTokens) {
    const int n = within_page(vectors.high, first);
    const bool finite_q = pack_vectors(t, t.q, first, n, t.dk, wide_dk, block.queries);
    const bool finite_d = pack_vectors(t, b.d_out, first, n, t.dv, wide_dv, block.d_out);
    uint64_t seen[kPageTokens] = {};
    for (int v = 0; v < n; v += kSharing)
      with_count<kSharing>(n - v, [&]<int R> {
        visit_backward<R>(b, block, start, first + v, v, seen + v, w + v, ds + v);
      });
    transpose_block(w);
    transpose_block(ds);
    add_transposed(block.d_out, wide_dv, finite_d, seen, n, w, dv, dv_size);
    add_transposed(block.queries, wide_dk, finite_q, seen, n, ds, dk, dk_size);
  }
  store_sums(dk, dk_size, keys, t.dk, dk_rows, b.dk_stride);
  store_sums(dv, dv_size, keys, t.dv, dv_rows, b.dv_stride);
}

}  // namespace
}  // namespace bitnet
