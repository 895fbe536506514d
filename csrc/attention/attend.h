// Blocked causal attention over the pages of a KV cache, over F16; the arithmetic stands in
// attention.h. Include what blocks.h wants first.
#pragma once
#include "attention/blocks.h"

namespace bitnet {
namespace {

// R vectors with one page: their queries, states, and the keys [low, high) of the page each sees.
template <int R>
struct Tile {
  const float* q[R];
  float* state[R];
  int low[R], high[R];
  uint64_t seen[R];
};

BITNET_INLINE void scale_scores(float* s, const float* key_scales, float scale, uint64_t seen) {
  const F16 never = set1(-__builtin_inff()), factor = set1(scale);
  for (int t = 0; t < kPageTiles; ++t) {
    F16 x = load(s + 16 * t);
    if (key_scales) x = mul(x, load(key_scales + 16 * t));
    store(s + 16 * t, select(seen_keys(seen, t), mul(x, factor), never));
  }
}

// One page for R vectors. Keys that all see go through the registers together; those that only
// some see (the diagonal, the window's edge) one vector at a time, still in ascending order.
template <int R, class T>
void visit_page(const AttendTask& t, const uint8_t* page, const Tile<R>& tile) {
  const T* keys = reinterpret_cast<const T*>(page);
  const T* values = keys + kPageTokens * t.dk;
  constexpr bool kScaled = sizeof(T) == 1;  // int8
  const float* scales =
      kScaled ? reinterpret_cast<const float*>(values + kPageTokens * t.dv) : nullptr;
  const float* value_scales = scales ? scales + kPageTokens : nullptr;
  alignas(64) float s[R][kPageTokens];
  dots<R>(keys, t.dk, tile.q, s);
  const auto row = rows_at(values, t.dv);
  int low = 0, high = int(kPageTokens);
  for (int r = 0; r < R; ++r) {
    low = tile.low[r] > low ? tile.low[r] : low;
    high = tile.high[r] < high ? tile.high[r] : high;
  }
  if constexpr (!kScaled) {
    if (low == 0 && high == int(kPageTokens)) {
      if (soften_whole<R>(scaled_by(t.scale), t.dv, tile.state, s))
        return add_values<R>(row, t.dv, low, high, tile.state, s);
      dots<R>(keys, t.dk, tile.q, s);
    }
  }
  for (int r = 0; r < R; ++r) scale_scores(s[r], scales, t.scale, tile.seen[r]);
  soften<R>(tile.state, tile.seen, t.dv, s, [&](int, int i, F16 p) {
    return value_scales ? mul(p, load(value_scales + 16 * i)) : p;
  });
  if (low >= high) low = high = int(kPageTokens);  // nothing in common
  for (int r = 0; r < R; ++r)
    add_values<1>(row, t.dv, tile.low[r], tile.high[r] < low ? tile.high[r] : low, tile.state + r,
                  s + r);
  add_values<R>(row, t.dv, low, high, tile.state, s);
  for (int r = 0; r < R; ++r)
    add_values<1>(row, t.dv, tile.low[r] > high ? tile.low[r] : high, tile.high[r], tile.state + r,
                  s + r);
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
    tile.seen[r] = key_bits(tile.low[r], tile.high[r]);
    any |= tile.seen[r] != 0;
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
  clear_states(states, task.count, task.dv);
  if (task.dtype == Dtype::f32)
    chunk_as<float>(task, index, states);
  else if (task.dtype == Dtype::f16)
    chunk_as<uint16_t>(task, index, states);
  else
    chunk_as<int8_t>(task, index, states);
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
