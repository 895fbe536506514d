// Blocked attention over dense arrays, over F16; what it computes stands in dense.h. Include what
// blocks.h wants and attention/append.h first.
#pragma once
#include "attention/attend_in_place.h"

namespace bitnet {
namespace {

// Vectors [first, first + R) of the task with the packed keys [start, start + n).
template <int R>
void visit_block(const DenseTask& t, const Packed& packed, int64_t start, int n, int32_t first,
                 float* states) {
  Vector vector[R];
  const float* q[R];
  float* state[R];
  uint64_t seen[R], any = 0;
  for (int r = 0; r < R; ++r) {
    vector[r] = vector_at(t, first + r);
    q[r] = packed.queries + int64_t(first + r) * packed.wide_dk;
    state[r] = states + (first + r) * state_floats(t.dv);
    seen[r] = seen_by(t, vector[r], start);
    any |= seen[r];
  }
  if (!any && t.score_kind == ScoreKind::none) return;
  alignas(64) float s[R][kPageTokens];
  if (t.int8) {
    const int32_t* pairs[R];
    for (int r = 0; r < R; ++r) pairs[r] = reinterpret_cast<const int32_t*>(q[r]);
    dots<R>(reinterpret_cast<const int32_t*>(packed.keys), packed.wide_dk / 2, pairs, s);
  } else {
    dots<R>(packed.keys, t.dk, q, s);
  }
  const float* key_scales = t.int8 ? packed.key_scales : nullptr;
  soften_scores<R>(t, key_scales, packed.query_scales + first, vector, start, n, seen, state, s);
  add_seen<R>(packed.value_rows(), packed.wide_dv, [&] { return packed.finite; }, seen, state, s);
}

void dense_chunk(const DenseTask& t, int64_t chunk, float* states, float* scratch) {
  clear_states(states, t.count, t.dv);
  Packed packed(t, scratch);
  pack_queries(t, packed);
  const auto [low, high] = blocks_of(t, chunk);
  if (reads_in_place(t))
    return chunk_in_place(t, low, high, packed.queries, packed.wide_dk, states);
  const auto rows = [&](int64_t v) { return v * kPageTokens / t.count; };
  for (int64_t start = low; start < high; start += kPageTokens) {
    const int n = within_page(t.keys, start);
    pack_keys(t, start, n, packed);
    pack_values(t, start, n, packed);
    for (int32_t v = 0; v < t.count; v += kSharing) {
      // The next block's rows come from memory while this one's are worked on.
      for (int64_t i = rows(v); i < rows(v + kSharing); ++i)
        prefetch_row(t, start + kPageTokens + i);
      with_count<kSharing>(t.count - v,
                           [&]<int R> { visit_block<R>(t, packed, start, n, v, states); });
    }
  }
}

// A row of scores becomes probabilities, by the row's final state.
BITNET_INLINE void normalise(float* scores, int64_t keys, const float* state) {
  const F16 never = set1(-__builtin_inff()), m = set1(state[0]);
  const F16 sum = set1(reduce_add(load(state + 16)));
  each_span(keys, [&](int64_t j, auto span) {
    const F16 x = load(scores + j, span);
    store(scores + j, select(eq(x, never), zero(), div(exp(sub(x, m)), sum)), span);
  });
}

// out = o / l, zeros where no key was seen; + 0 makes every zero positive.
void dense_finish(const DenseTask& t, const float* states) {
  for (int32_t i = 0; i < t.count; ++i, states += state_floats(t.dv)) {
    const Vector v = vector_at(t, i);
    float* to = t.out + v.row * t.out_stride + v.head * t.out_head;
    const F16 sum = set1(reduce_add(load(states + 16)));
    each_span(t.dv, [&](int64_t d, auto span) {
      const F16 y = add(div(load(states + kStateHeader + d), sum), zero());
      store(to + d, states[1] == 0.0f ? zero() : y, span);
    });
    if (t.score_kind == ScoreKind::softmax)
      normalise(t.scores + v.row * t.score_stride + v.head * t.score_head, t.keys, states);
  }
}

}  // namespace
}  // namespace bitnet
