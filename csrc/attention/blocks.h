// What paged and dense attention share: one block of 64 keys for R query vectors, over F16. The
// arithmetic stands in attention.h. Before it: a lanes header, rowwise/math.h, and kSharing, the
// most query vectors that share a pass over a block.
#pragma once
#include "attention/attention.h"
#include "base/counts.h"
#include "base/spans.h"

namespace bitnet {
namespace {

BITNET_INLINE F16 widen(const float* p) { return load(p); }
BITNET_INLINE F16 widen(const uint16_t* p) { return load_f16(p); }
BITNET_INLINE F16 widen(const int8_t* p) { return load_i8(p); }

constexpr int kPageTiles = int(kPageTokens / 16);

// s[r][j] = q[r] . k[j] for the block's 64 keys, K in tiles [4][dk][16].
template <int R, class T>
BITNET_INLINE void dots(const T* keys, int32_t dk, const float* const* q, float (*s)[kPageTokens]) {
  constexpr int tiles = kLaneRegisters >= 32 || R == 1   ? kPageTiles
                        : kLaneRegisters >= 16 || R == 2 ? 2
                                                         : 1;
  for (int first = 0; first < kPageTiles; first += tiles) {
    const T* base = keys + int64_t(first) * dk * 16;
    F16 sum[R][tiles], key[tiles];
    each_of<R, tiles>([&]<int r, int t>() BITNET_LAMBDA { sum[r][t] = zero(); });
    for (int32_t d = 0; d < dk; ++d) {
      each<tiles>([&]<int t>()
                      BITNET_LAMBDA { key[t] = widen(base + (int64_t(t) * dk + d) * 16); });
      each_of<R, tiles>([&]<int r, int t>()
                            BITNET_LAMBDA { add_product(sum[r][t], q[r] + d, key[t]); });
    }
    each_of<R, tiles>([&]<int r, int t>()
                          BITNET_LAMBDA { store(s[r] + (first + t) * 16, sum[r][t]); });
  }
}

// Bits low..high-1 of the 64 keys of a block.
BITNET_INLINE uint64_t key_bits(int low, int high) {
  const uint64_t below = high >= 64 ? ~0ull : (1ull << high) - 1;
  const uint64_t before = low >= 64 ? ~0ull : (1ull << low) - 1;
  return below & ~before;
}
// Those of 16-key tile t.
BITNET_INLINE M16 seen_keys(uint64_t seen, int t) {
  return mask_of(uint32_t(seen >> (16 * t)) & 0xffffu);
}

BITNET_INLINE int within_page(int64_t key, int64_t start) {
  const int64_t at = key - start;
  return at < 0 ? 0 : at > kPageTokens ? int(kPageTokens) : int(at);
}

BITNET_INLINE float largest_of(const float* s) {
  return reduce_max(max(max(load(s), load(s + 16)), max(load(s + 32), load(s + 48))));
}

// o *= c
BITNET_INLINE void rescale(float* state, int32_t dv, float c) {
  if (c == 1.0f) return;  // o * 1 is o
  for (int32_t d = 0; d < dv; d += 16)
    store(state + kStateHeader + d, mul(load(state + kStateHeader + d), set1(c)));
}

// Scores become weights p, those that multiply the values adjusted by `weigh` (r, tile, p); m, l
// and o of each state move to the new m. A vector that sees no key keeps scores and state.
template <int R, class Weigh>
BITNET_INLINE void soften(float* const* states, const uint64_t* seen, int32_t dv,
                          float (*s)[kPageTokens], Weigh weigh) {
  alignas(64) float change[16] = {};
  for (int r = 0; r < R; ++r) {
    if (!seen[r]) continue;
    float* state = states[r];
    const float block = largest_of(s[r]), m = state[0] > block ? state[0] : block;
    change[r] = state[0] - m;
    state[0] = m;
    state[1] = 1.0f;
  }
  store(change, exp(load(change)));
  for (int r = 0; r < R; ++r) {
    if (!seen[r]) continue;
    float* state = states[r];
    const F16 m = set1(state[0]), c = set1(change[r]);
    F16 l = mul(load(state + 16), c);
    for (int t = 0; t < kPageTiles; ++t) {
      const F16 p = select(seen_keys(seen[r], t), exp(sub(load(s[r] + 16 * t), m)), zero());
      l = add(l, p);
      store(s[r] + 16 * t, weigh(r, t, p));
    }
    store(state + 16, l);
    rescale(state, dv, change[r]);
  }
}

// Scores that are dot products times one factor.
BITNET_INLINE auto scaled_by(float scale) {
  return [factor = set1(scale)](int, int, F16 x) BITNET_LAMBDA { return mul(x, factor); };
}

// soften for dot products, scaled by scaled(r, tile, x), with 64 keys that every vector sees:
// without masks and in two passes. False, and no state has changed, where a score is -inf.
template <int R, class Scaled>
BITNET_INLINE bool soften_whole(Scaled scaled, int32_t dv, float* const* states,
                                float (*s)[kPageTokens]) {
  F16 least = set1(__builtin_inff());
  float most[R], highest = -__builtin_inff();
  for (int r = 0; r < R; ++r) {
    F16 x[kPageTiles];
    for (int i = 0; i < kPageTiles; ++i) {
      x[i] = scaled(r, i, load(s[r] + 16 * i));
      store(s[r] + 16 * i, x[i]);
      least = min(x[i], least);  // of NaN and a number, the number
    }
    most[r] = reduce_max(max(max(x[0], x[1]), max(x[2], x[3])));
  }
  if (mask_bits(eq(least, set1(-__builtin_inff())))) return false;
  alignas(64) float change[16] = {};
  for (int r = 0; r < R; ++r) {
    const float m = states[r][0] > most[r] ? states[r][0] : most[r];
    change[r] = states[r][0] - m;
    states[r][0] = m;
    states[r][1] = 1.0f;
    highest = m > highest ? m : highest;
  }
  store(change, exp(load(change)));
  const auto weigh = [&](auto power) BITNET_LAMBDA {
    for (int r = 0; r < R; ++r) {
      const F16 m = set1(states[r][0]);
      F16 l = mul(load(states[r] + 16), set1(change[r]));
      for (int i = 0; i < kPageTiles; ++i) {
        const F16 p = power(sub(load(s[r] + 16 * i), m));
        l = add(l, p);
        store(s[r] + 16 * i, p);
      }
      store(states[r] + 16, l);
    }
  };
  if (mask_bits(lt(least, set1(highest - 100.0f))))
    weigh([](F16 x) BITNET_LAMBDA { return exp(x); });
  else  // as nearly always
    weigh([](F16 x) BITNET_LAMBDA { return exp_within(x); });
  for (int r = 0; r < R; ++r) rescale(states[r], dv, change[r]);
  return true;
}

// o[d .. d + 16 N) += p[j] v[j] over keys [low, high), v[j] = row(j).
template <int R, int N, class Row, class Span>
BITNET_INLINE void add_columns(Row row, int32_t d, Span span, int low, int high,
                               float* const* state, const float (*p)[kPageTokens]) {
  F16 sum[R][N], value[N];
  each_of<R, N>([&]<int r, int n>()
                    BITNET_LAMBDA { sum[r][n] = load(state[r] + kStateHeader + d + 16 * n); });
  for (int j = low; j < high; ++j) {
    const auto values = row(j);
    each<N>([&]<int n>() BITNET_LAMBDA { value[n] = values.at(d + 16 * n, span); });
    each_of<R, N>([&]<int r, int n>()
                      BITNET_LAMBDA { add_product(sum[r][n], p[r] + j, value[n]); });
  }
  each_of<R, N>([&]<int r, int n>()
                    BITNET_LAMBDA { store(state[r] + kStateHeader + d + 16 * n, sum[r][n]); });
}

// Vectors of columns whose sums for R rows stay in registers.
template <int R>
constexpr int kColumns = kLaneRegisters >= 32 ? (R <= 3 ? 8 : 4)
                         : R == 1             ? 4
                         : R == 2             ? 2
                                              : 1;

// N vectors of columns at a time, then half as many, down to one.
template <int R, int N, class Row>
BITNET_INLINE void add_spans(Row row, int32_t d, int32_t dv, int low, int high, float* const* state,
                             const float (*p)[kPageTokens]) {
  for (; d + 16 * N <= dv; d += 16 * N) add_columns<R, N>(row, d, Whole{}, low, high, state, p);
  if constexpr (N > 1)
    add_spans<R, N / 2>(row, d, dv, low, high, state, p);
  else if (d < dv)
    add_columns<R, 1>(row, d, Part{dv - d}, low, high, state, p);
}

template <int R, class Row>
void add_values(Row row, int32_t dv, int low, int high, float* const* state,
                const float (*p)[kPageTokens]) {
  if (low < high) add_spans<R, kColumns<R>>(row, 0, dv, low, high, state, p);
}

// Rows of a page's values, `width` apart.
BITNET_INLINE auto rows_at(const float* p, int32_t width) {
  return [=](int64_t j) { return F32Row{p + j * width}; };
}
BITNET_INLINE auto rows_at(const uint16_t* p, int32_t width) {
  return [=](int64_t j) { return Half16Row{p + j * width}; };
}
BITNET_INLINE auto rows_at(const int8_t* p, int32_t width) {
  return [=](int64_t j) { return Int8Row{p + j * width}; };
}

// `count` states that have seen no key.
BITNET_INLINE void clear_states(float* states, int32_t count, int32_t dv) {
  const int64_t size = state_floats(dv);
  for (int64_t i = 0; i < count * size; i += 16) store(states + i, zero());
  for (int32_t v = 0; v < count; ++v) states[v * size] = -__builtin_inff();
}

// m = max(m1, m2); l and o = part * exp(m2 - m) + total * exp(m1 - m). A state that saw no key
// changes nothing.
BITNET_INLINE void merge(float* total, const float* part, int32_t count, int32_t dv) {
  const int64_t size = state_floats(dv);
  for (; count > 0; --count, total += size, part += size) {
    if (part[1] == 0.0f) continue;
    if (total[1] == 0.0f) {
      for (int64_t i = 0; i < size; i += 16) store(total + i, load(part + i));
      continue;
    }
    const float m = total[0] > part[0] ? total[0] : part[0];
    alignas(64) float change[16] = {total[0] - m, part[0] - m};
    store(change, exp(load(change)));
    const F16 old = set1(change[0]), fresh = set1(change[1]);
    total[0] = m;
    for (int64_t i = 16; i < size; i += 16)
      store(total + i, fma(load(part + i), fresh, mul(load(total + i), old)));
  }
}

}  // namespace
}  // namespace bitnet
