// Blocked attention of int8 codes, over F16; what it computes stands in attention_int8.h. Include
// what attention/blocks.h wants and attention/append.h first.
#pragma once
#include "attention_int8/codes.h"

namespace bitnet {
namespace {

constexpr int kPairs = kPageTokens / 2;  // words of a block's weights
constexpr float kWeightLevels = 2047.0f;

// s[r][j] = q[r] . k[j] for the block's 64 keys.
template <int R>
BITNET_INLINE void code_dots(const int32_t* keys, int32_t words, const int32_t* const* q,
                             const int32_t* sums, float (*s)[kPageTokens]) {
  // Without an instruction that adds, a product takes a register of its own: half of them.
  constexpr int room = kLaneRegisters / (kByteProducts ? 1 : 2);
  constexpr int tiles = room >= 32 || R == 1 ? kPageTiles : room >= 16 || R == 2 ? 2 : 1;
  for (int first = 0; first < kPageTiles; first += tiles) {
    const int32_t* base = keys + int64_t(first) * words * 16;
    I16 sum[R][tiles];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < tiles; ++i) sum[r][i] = set1_int(0);
    for (int32_t u = 0; u < words; ++u) {
      I16 key[tiles];
      for (int i = 0; i < tiles; ++i) key[i] = load_int(base + (int64_t(i) * words + u) * 16);
      each<R>([&]<int r>() BITNET_LAMBDA {
        const I16 x = set1_int(q[r][u]);
        each<tiles>([&]<int i>()
                        BITNET_LAMBDA { sum[r][i] = add_word_products(sum[r][i], key[i], x); });
      });
    }
    for (int r = 0; r < R; ++r) {
      const I16 extra = set1_int(kByteProducts ? sums[r] : 0);
      for (int i = 0; i < tiles; ++i)
        store(s[r] + (first + i) * 16, to_float(sub(sum[r][i], extra)));
    }
  }
}

// Weights of R vectors as codes of at most kWeightLevels, two to a word as value rows are; what a
// sum of products of theirs is to be multiplied by.
template <int R>
BITNET_INLINE void code_weights(const Codes& codes, const uint64_t* seen, float (*p)[kPageTokens],
                                int32_t (*pairs)[kPairs], float* factors) {
  alignas(64) float most[16] = {}, multiply[16];
  for (int r = 0; r < R; ++r) {
    if (!seen[r]) continue;
    for (int i = 0; i < kPageTiles; ++i)
      store(p[r] + 16 * i, mul(load(p[r] + 16 * i), load(codes.value_scales + 16 * i)));
    most[r] = largest_of(p[r]);
  }
  const F16 bounded = max(load(most), set1(1e-30f)), levels = set1(kWeightLevels);
  store(multiply, div(levels, bounded));
  store(factors, div(bounded, levels));
  for (int r = 0; r < R; ++r) {
    const F16 x = set1(multiply[r]);
    I16 code[kPageTiles];
    for (int i = 0; i < kPageTiles; ++i)
      code[i] = seen[r] ? to_int(mul(load(p[r] + 16 * i), x)) : set1_int(0);
    store_int(pairs[r], pair_of(code[0], code[1]));
    store_int(pairs[r] + 16, pair_of(code[2], code[3]));
    if (seen[r] & codes.bad) factors[r] = __builtin_nanf("");
  }
}

// o[d .. d + 16 N) += factor * sum of weights and values over words [low, high).
template <int R, int N>
BITNET_INLINE void add_code_columns(const int32_t* values, int32_t wide, int32_t d, int low,
                                    int high, const int32_t (*pairs)[kPairs], const float* factors,
                                    float* const* states) {
  I16 sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sum[r][n] = set1_int(0);
  for (int u = low; u < high; ++u) {
    I16 value[N];
    for (int n = 0; n < N; ++n) value[n] = load_int(values + int64_t(u) * wide + d + 16 * n);
    each<R>([&]<int r>() BITNET_LAMBDA {
      const I16 x = set1_int(pairs[r][u]);
      each<N>([&]<int n>()
                  BITNET_LAMBDA { sum[r][n] = add_pair_products(sum[r][n], value[n], x); });
    });
  }
  for (int r = 0; r < R; ++r) {
    float* o = states[r] + kStateHeader + d;
    for (int n = 0; n < N; ++n)
      store(o + 16 * n, fma(to_float(sum[r][n]), set1(factors[r]), load(o + 16 * n)));
  }
}

template <int R, int N>
BITNET_INLINE void add_code_spans(const Codes& codes, int32_t d, int low, int high,
                                  const int32_t (*pairs)[kPairs], const float* factors,
                                  float* const* states) {
  for (; d + 16 * N <= codes.wide_dv; d += 16 * N)
    add_code_columns<R, N>(codes.values, codes.wide_dv, d, low, high, pairs, factors, states);
  if constexpr (N > 1) add_code_spans<R, N / 2>(codes, d, low, high, pairs, factors, states);
}

// Weights times words [low, high) of the values.
template <int R>
BITNET_INLINE void add_codes(const Codes& codes, const uint64_t* seen, int low, int high,
                             float* const* states, float (*p)[kPageTokens]) {
  alignas(64) int32_t pairs[R][kPairs];
  alignas(64) float factors[16];
  code_weights<R>(codes, seen, p, pairs, factors);
  add_code_spans<R, kColumns<R>>(codes, 0, low, high, pairs, factors, states);
}

// Vectors [first, first + R) of the task with the coded keys [start, start + n).
template <int R>
void visit_codes(const DenseTask& t, const Codes& codes, int64_t start, int n, int32_t first,
                 float* states) {
  Visit<R, int32_t> at(t, start, first, codes.queries, codes.words, states);
  if (at.idle(t)) return;
  alignas(64) float s[R][kPageTokens];
  code_dots<R>(codes.keys, codes.words, at.q, codes.query_sums + first, s);
  soften_scores<R>(t, codes.key_scales, codes.query_scales + first, at.vector, start, n, at.seen,
                   at.state, s);
  const int low = uint32_t(at.any) ? 0 : 16, high = at.any >> 32 ? kPairs : 16;
  add_codes<R>(codes, at.seen, low, high, at.state, s);
}

// The same where they see all of the block, and their scores are plain.
template <int R>
void visit_whole_codes(const DenseTask& t, const Codes& codes, int64_t start, int32_t first,
                       float* states) {
  const Vectors<R, int32_t> at(t, first, codes.queries, codes.words, states);
  float factors[R];
  uint64_t seen[R];
  for (int r = 0; r < R; ++r) {
    factors[r] = codes.query_scales[first + r] * t.scale;
    seen[r] = ~uint64_t(0);
  }
  alignas(64) float s[R][kPageTokens];
  code_dots<R>(codes.keys, codes.words, at.q, codes.query_sums + first, s);
  const auto scaled = [&](int r, int i, F16 x) BITNET_LAMBDA {
    return mul(mul(x, load(codes.key_scales + 16 * i)), set1(factors[r]));
  };
  if (soften_whole<R>(scaled, t.dv, at.state, s))
    add_codes<R>(codes, seen, 0, kPairs, at.state, s);
  else
    visit_codes<R>(t, codes, start, kPageTokens, first, states);
}

void chunk_int8(const DenseTask& t, int64_t chunk, float* states, float* scratch) {
  clear_states(states, t.count, t.dv);
  Codes codes(t, scratch);
  code_queries(t, codes);
  const bool simple = plain_weights(t);
  const auto [begin, end] = blocks_of(t, chunk);
  for (int64_t start = begin; start < end; start += kPageTokens) {
    const int n = within_page(t.keys, start);
    const Ahead ahead(t, start);
    code_keys(t, start, n, ahead, codes);
    code_values(t, start, n, ahead, codes);
    for (int32_t v = 0; v < t.count; v += kSharing)
      with_count<kSharing>(t.count - v, [&]<int R> {
        if (simple && see_whole(t, v, v + R, start))
          visit_whole_codes<R>(t, codes, start, v, states);
        else
          visit_codes<R>(t, codes, start, n, v, states);
      });
  }
}

}  // namespace
}  // namespace bitnet
