// Dense attention of few query vectors: keys and values are read where they lie, each once, and 16
// keys at a time turn into lanes within registers. Packed blocks, which many vectors share, give
// the same bits. Include what attention/dense_scores.h wants first.
#pragma once
#include <type_traits>

#include "attention/dense_scores.h"

namespace bitnet {
namespace {

// With more vectors, packing a block once is quicker than to transpose it for each kSharing of
// them.
constexpr int32_t kInPlaceVectors = kLaneRegisters >= 32 ? 16 : 12;

// Adds x[i] * q[r][i] for i < n, in ascending order, to the 16 sums of each vector.
template <int R>
BITNET_INLINE void add_lanes(const F16* x, int n, const float* const* q, int64_t d, F16* sum) {
  for (int i = 0; i < n; ++i)
    for (int r = 0; r < R; ++r) sum[r] = fma(set1(q[r][d + i]), x[i], sum[r]);
}

// The same for 16 keys along all of dk, at(j, d, span) of each.
template <int R, class At>
BITNET_INLINE void add_group(At at, int32_t dk, const float* const* q, F16* sum) {
  each_span(dk, [&](int64_t d, auto span) {
    F16 x[16];
    for (int j = 0; j < 16; ++j) x[j] = at(j, d, span);
    transpose(x);
    add_lanes<R>(x, width_of(span), q, d, sum);
  });
}

// The same for keys [first, first + 16 G) in float32, of which no sum waits for another.
template <int R, int G>
BITNET_INLINE void add_groups(const Lines& keys, int first, int32_t dk, const float* const* q,
                              const Ahead& ahead, F16 (*sum)[R]) {
  for (int32_t d = 0; d < dk; d += 4) {
    F16 x[G][4];
    for (int g = 0; g < G; ++g)
      load_columns(reinterpret_cast<const float*>(keys.at(first + 16 * g, d)), keys.row / 4, x[g]);
    const int row = first + d % 16 * G;  // every line once in four steps
    keys.fetch_rows<4 * G, 1>(row, d + 16);
    ahead.keys.fetch_rows<4 * G, 2>(row, d), ahead.values.fetch_rows<4 * G, 2>(row, d);
    for (int i = 0; i < 4; ++i)
      for (int g = 0; g < G; ++g)
        for (int r = 0; r < R; ++r) sum[g][r] = fma(set1(q[r][d + i]), x[g][i], sum[g][r]);
  }
}

// s[r][j] = q[r] . k[j] for keys j = 0..n-1 of a block, k[j] = row(j); `wanted`: keys whose scores
// somebody reads. The order of dots() in blocks.h: along d, a key to a lane.
template <int R, class Row>
BITNET_INLINE void dots_in_place(Row row, int n, int32_t dk, uint64_t wanted, const float* const* q,
                                 const Lines& keys, const Ahead& ahead, float (*s)[kPageTokens]) {
  int first = 0;
  if constexpr (std::is_same_v<decltype(row(0)), F32Row>) {
    constexpr int G = kLaneRegisters >= 32 ? 2 : 1;
    for (; dk % 4 == 0 && first + 16 * G <= n; first += 16 * G) {
      F16 sum[G][R];
      each_of<G, R>([&]<int g, int r>() BITNET_LAMBDA { sum[g][r] = zero(); });
      if (wanted >> first & ((1ull << 16 * G) - 1))
        add_groups<R, G>(keys, first, dk, q, ahead, sum);
      each_of<G, R>([&]<int g, int r>() BITNET_LAMBDA { store(s[r] + first + 16 * g, sum[g][r]); });
    }
  }
  for (; first < kPageTokens; first += 16) {
    F16 sum[R];
    for (int r = 0; r < R; ++r) sum[r] = zero();
    if (wanted >> first & 0xffff) {
      const auto at = [&](int j, int64_t d, auto span) { return row(first + j).at(d, span); };
      const auto fetched = [&](int j, int64_t d, auto span) {
        ahead.keys.fetch(first + j, d);
        ahead.values.fetch(first + j, d);
        return at(j, d, span);
      };
      const auto some = [&](int j, int64_t d, auto span) {
        return first + j < n ? at(j, d, span) : zero();
      };
      if (first + 16 <= n)
        add_group<R>(fetched, dk, q, sum);
      else
        add_group<R>(some, dk, q, sum);
    }
    for (int r = 0; r < R; ++r) store(s[r] + first, sum[r]);
  }
}

// Whether rows [low, high) are finite.
template <class Row>
bool all_finite(Row row, int low, int high, int32_t width) {
  const F16 infinity = set1(__builtin_inff());
  uint32_t finite = 0xffff;
  for (int j = low; j < high; ++j)
    each_span(width, [&](int64_t d, auto span) {
      finite &= mask_bits(lt(abs(row(j).at(d, span)), infinity));
    });
  return finite == 0xffff;
}

// Vectors [first, first + R) of the task with keys [start, start + n), n <= 64.
template <int R>
void visit_in_place(const DenseTask& t, int64_t start, int n, int32_t first, const float* queries,
                    int32_t wide_dk, float* states) {
  Visit<R, float> at(t, start, first, queries, wide_dk, states);
  if (at.idle(t)) return;
  alignas(64) float s[R][kPageTokens];
  const uint64_t wanted = t.score_kind == ScoreKind::none ? at.any : ~0ull;
  with_rows(t.k.data, t.k.dtype, t.k.stride, [&](auto row) {
    dots_in_place<R>([&](int j) { return row(start + j); }, n, t.dk, wanted, at.q,
                     Lines(t.k, start), Ahead(t, start), s);
  });
  soften_scores<R>(t, nullptr, nullptr, at.vector, start, n, at.seen, at.state, s);
  with_rows(t.v.data, t.v.dtype, t.v.stride, [&](auto row) {
    const auto value = [&](int j) { return row(start + j); };
    const auto finite = [&] { return all_finite(value, 0, n, t.dv); };
    add_seen<R>(value, t.dv, finite, at.seen, at.state, s);
  });
}

// Keys [low, high) of one chunk; queries [count][wide_dk].
void chunk_in_place(const DenseTask& t, int64_t low, int64_t high, const float* queries,
                    int32_t wide_dk, float* states) {
  for (int64_t start = low; start < high; start += kPageTokens) {
    const int n = within_page(t.keys, start);
    for (int32_t v = 0; v < t.count; v += kSharing)
      with_count<kSharing>(
          t.count - v, [&]<int R> { visit_in_place<R>(t, start, n, v, queries, wide_dk, states); });
  }
}

}  // namespace
}  // namespace bitnet
