// Blocked causal attention over F16; the arithmetic stands in attention.h. Before it: a lanes
// header, rowwise/math.h, and kSharing, the most query vectors that share a pass over a page.
#pragma once
#include "attention/attention.h"
#include "base/counts.h"

namespace bitnet {
namespace {

BITNET_INLINE F16 widen(const float* p) { return load(p); }
BITNET_INLINE F16 widen(const uint16_t* p) { return load_f16(p); }
BITNET_INLINE F16 widen(const int8_t* p) { return load_i8(p); }
BITNET_INLINE F16 widen_partial(const float* p, int n) { return load_partial(p, n); }
BITNET_INLINE F16 widen_partial(const uint16_t* p, int n) { return load_f16_partial(p, n); }
BITNET_INLINE F16 widen_partial(const int8_t* p, int n) { return load_i8_partial(p, n); }

constexpr int kPageTiles = int(kPageTokens / 16);

// R vectors with one page: their queries, states, and the keys [low, high) of the page each sees.
template <int R>
struct Tile {
  const float* q[R];
  float* state[R];
  int low[R], high[R];
};

// s[r][j] = q[r] . k[j] for the page's 64 keys.
template <int R, class T>
BITNET_INLINE void dots(const T* keys, int32_t dk, const Tile<R>& tile, float (*s)[kPageTokens]) {
  // Accumulators that the registers hold beside the operands.
  constexpr int tiles = kLaneRegisters >= 32 || R == 1 ? kPageTiles : R == 2 ? 2 : 1;
  for (int first = 0; first < kPageTiles; first += tiles) {
    const T* base = keys + int64_t(first) * dk * 16;
    F16 sum[R][tiles];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < tiles; ++t) sum[r][t] = zero();
    for (int32_t d = 0; d < dk; ++d) {
      F16 key[tiles];
      for (int t = 0; t < tiles; ++t) key[t] = widen(base + (int64_t(t) * dk + d) * 16);
      for (int r = 0; r < R; ++r) {
        const F16 x = set1(tile.q[r][d]);
        for (int t = 0; t < tiles; ++t) sum[r][t] = fma(x, key[t], sum[r][t]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < tiles; ++t) store(s[r] + (first + t) * 16, sum[r][t]);
  }
}

// The keys [low, high) of 16-key tile t.
BITNET_INLINE M16 seen_keys(int low, int high, int t) {
  const uint64_t below = high >= 64 ? ~0ull : (1ull << high) - 1;
  const uint64_t before = low >= 64 ? ~0ull : (1ull << low) - 1;
  return mask_of(uint32_t((below & ~before) >> (16 * t)) & 0xffffu);
}

BITNET_INLINE void scale_scores(float* s, const float* key_scales, float scale, int low, int high) {
  const F16 never = set1(-__builtin_inff()), factor = set1(scale);
  for (int t = 0; t < kPageTiles; ++t) {
    F16 x = load(s + 16 * t);
    if (key_scales) x = mul(x, load(key_scales + 16 * t));
    store(s + 16 * t, select(seen_keys(low, high, t), mul(x, factor), never));
  }
}

BITNET_INLINE float largest_of(const float* s) {
  return reduce_max(max(max(load(s), load(s + 16)), max(load(s + 32), load(s + 48))));
}

// Scores become weights p (times the value scales); m, l and o of each state move to the new m.
template <int R>
BITNET_INLINE void soften(const Tile<R>& tile, const float* value_scales, int32_t dv,
                          float (*s)[kPageTokens]) {
  alignas(64) float change[16] = {};
  for (int r = 0; r < R; ++r) {
    if (tile.low[r] >= tile.high[r]) continue;
    float* state = tile.state[r];
    const float block = largest_of(s[r]), m = state[0] > block ? state[0] : block;
    change[r] = state[0] - m;
    state[0] = m;
    state[1] = 1.0f;
  }
  store(change, exp(load(change)));
  for (int r = 0; r < R; ++r) {
    if (tile.low[r] >= tile.high[r]) continue;
    float* state = tile.state[r];
    const F16 m = set1(state[0]), c = set1(change[r]);
    F16 l = mul(load(state + 16), c);
    for (int t = 0; t < kPageTiles; ++t) {
      const M16 seen = seen_keys(tile.low[r], tile.high[r], t);
      F16 p = select(seen, exp(sub(load(s[r] + 16 * t), m)), zero());
      l = add(l, p);
      if (value_scales) p = mul(p, load(value_scales + 16 * t));
      store(s[r] + 16 * t, p);
    }
    store(state + 16, l);
    if (change[r] == 1.0f) continue;  // o * 1 is o
    for (int32_t d = 0; d < dv; d += 16)
      store(state + kStateHeader + d, mul(load(state + kStateHeader + d), c));
  }
}

// o[d .. d + 16 N) += p[j] v[j] over keys [low, high); `tail` < 16: lanes of the only vector.
template <int R, int N, class T>
BITNET_INLINE void add_columns(const T* values, int32_t dv, int32_t d, int tail, int low, int high,
                               float* const* state, const float (*p)[kPageTokens]) {
  F16 sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sum[r][n] = load(state[r] + kStateHeader + d + 16 * n);
  for (int j = low; j < high; ++j) {
    const T* row = values + int64_t(j) * dv + d;
    F16 value[N];
    for (int n = 0; n < N; ++n) value[n] = tail ? widen_partial(row, tail) : widen(row + 16 * n);
    for (int r = 0; r < R; ++r) {
      const F16 x = set1(p[r][j]);
      for (int n = 0; n < N; ++n) sum[r][n] = fma(x, value[n], sum[r][n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(state[r] + kStateHeader + d + 16 * n, sum[r][n]);
}

template <int R, class T>
void add_values(const T* values, int32_t dv, int low, int high, float* const* state,
                const float (*p)[kPageTokens]) {
  constexpr int wide = kLaneRegisters >= 32 ? (R <= 3 ? 8 : 4) : R == 1 ? 4 : R == 2 ? 2 : 1;
  if (low >= high) return;
  int32_t d = 0;
  for (; d + 16 * wide <= dv; d += 16 * wide)
    add_columns<R, wide>(values, dv, d, 0, low, high, state, p);
  for (; d + 16 <= dv; d += 16) add_columns<R, 1>(values, dv, d, 0, low, high, state, p);
  if (d < dv) add_columns<R, 1>(values, dv, d, dv - d, low, high, state, p);
}

// One page for R vectors. Keys that all see go through the registers together; those that only
// some see (the diagonal, the window's edge) one vector at a time, still in ascending order.
template <int R, class T>
void visit_page(const AttendTask& t, const uint8_t* page, const Tile<R>& tile) {
  const T* keys = reinterpret_cast<const T*>(page);
  const T* values = keys + kPageTokens * t.dk;
  const float* scales =
      sizeof(T) == 1 ? reinterpret_cast<const float*>(values + kPageTokens * t.dv) : nullptr;
  alignas(64) float s[R][kPageTokens];
  dots<R>(keys, t.dk, tile, s);
  int low = 0, high = int(kPageTokens);
  for (int r = 0; r < R; ++r) {
    scale_scores(s[r], scales, t.scale, tile.low[r], tile.high[r]);
    low = tile.low[r] > low ? tile.low[r] : low;
    high = tile.high[r] < high ? tile.high[r] : high;
  }
  soften<R>(tile, scales ? scales + kPageTokens : nullptr, t.dv, s);
  if (low >= high) low = high = int(kPageTokens);  // nothing in common
  for (int r = 0; r < R; ++r)
    add_values<1>(values, t.dv, tile.low[r], tile.high[r] < low ? tile.high[r] : low,
                  tile.state + r, s + r);
  add_values<R>(values, t.dv, low, high, tile.state, s);
  for (int r = 0; r < R; ++r)
    add_values<1>(values, t.dv, tile.low[r] > high ? tile.low[r] : high, tile.high[r],
                  tile.state + r, s + r);
}

BITNET_INLINE int within_page(int64_t key, int64_t start) {
  const int64_t at = key - start;
  return at < 0 ? 0 : at > kPageTokens ? int(kPageTokens) : int(at);
}

template <int R, class T>
void visit(const AttendTask& t, int64_t page_index, int32_t first, float* states) {
  Tile<R> tile;
  const int64_t start = page_index * kPageTokens;
  bool any = false;
  for (int r = 0; r < R; ++r) {
    const int32_t v = t.first + first + r, row = v / t.group;
    const int64_t own = int64_t(t.first_pos) + row;
    tile.q[r] = t.q + row * t.q_stride + int64_t(v % t.group) * t.dk;
    tile.state[r] = states + (first + r) * state_floats(t.dv);
    tile.low[r] = t.window_left < 0 ? 0 : within_page(own - t.window_left, start);
    tile.high[r] = within_page(own + 1, start);
    any |= tile.low[r] < tile.high[r];
  }
  if (any) visit_page<R, T>(t, t.slabs[page_index] + t.page_offset, tile);
}

template <class T>
void chunk_as(const AttendTask& t, int64_t chunk, float* states) {
  const int64_t newest = int64_t(t.first_pos) + (t.first + t.count - 1) / t.group;
  const int64_t first_page = chunk * (kChunkTokens / kPageTokens);
  int64_t last_page = first_page + kChunkTokens / kPageTokens - 1;
  if (newest / kPageTokens < last_page) last_page = newest / kPageTokens;
  for (int64_t page = first_page; page <= last_page; ++page)
    for (int32_t v = 0; v < t.count; v += kSharing)
      with_count<kSharing>(t.count - v, [&]<int R> { visit<R, T>(t, page, v, states); });
}

void chunk(const AttendTask& task, int64_t index, float* states) {
  const int64_t size = state_floats(task.dv);
  for (int64_t i = 0; i < task.count * size; i += 16) store(states + i, zero());
  for (int32_t v = 0; v < task.count; ++v) states[v * size] = -__builtin_inff();
  if (task.dtype == Dtype::f32)
    chunk_as<float>(task, index, states);
  else if (task.dtype == Dtype::f16)
    chunk_as<uint16_t>(task, index, states);
  else
    chunk_as<int8_t>(task, index, states);
}

// m = max(m1, m2); l and o = part * exp(m2 - m) + total * exp(m1 - m). A state that saw no key
// changes nothing.
void merge(float* total, const float* part, int32_t count, int32_t dv) {
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

void finish(const AttendTask& t, const float* states, float* out, int64_t out_stride) {
  for (int32_t i = 0; i < t.count; ++i, states += state_floats(t.dv)) {
    const int32_t v = t.first + i;
    float* to = out + v / t.group * out_stride + int64_t(v % t.group) * t.dv;
    const F16 sum = set1(reduce_add(load(states + 16)));
    for (int32_t d = 0; d < t.dv; d += 16) {
      const F16 y = div(load(states + kStateHeader + d), sum);
      store_partial(to + d, states[1] == 0.0f ? zero() : y, t.dv - d < 16 ? t.dv - d : 16);
    }
  }
}

}  // namespace
}  // namespace bitnet
