// Blocked attention over dense arrays, over F16; what it computes stands in dense.h. Include what
// blocks.h wants first.
#pragma once
#include "attention/attend_in_place.h"

namespace bitnet {
namespace {

// One block of keys and the task's queries, in scratch.
struct Packed {
  float* keys;          // [4][dk][16]
  float* copies;        // of values, zero past dv
  float* queries;       // [count][wide_dk]
  const float* values;  // [64][wide_dv], copies or where they lie
  int32_t wide_dk, wide_dv;
  bool finite;  // all values of the block

  BITNET_INLINE Packed(const DenseTask& t, float* scratch)
      : wide_dk((t.dk + 15) / 16 * 16), wide_dv((t.dv + 15) / 16 * 16), finite(true) {
    keys = scratch;
    copies = keys + kPageTokens * wide_dk;
    queries = copies + kPageTokens * wide_dv;
    values = copies;
  }
  BITNET_INLINE auto value_rows() const { return rows_at(values, wide_dv); }
};

template <class Row>
BITNET_INLINE void widen_row(const Row& row, int32_t n, float* to) {
  each_span(n, [&](int64_t i, auto span) { store(to + i, row.at(i, span), span); });
}

void pack_queries(const DenseTask& t, const Packed& to) {
  with_rows(t.q.data, t.q.dtype, 1, [&](auto at) {
    for (int32_t i = 0; i < t.count; ++i) {
      const int64_t v = t.first + i;
      const auto row = at(v / t.group * t.q.stride + v % t.group * t.q.head_stride);
      widen_row(row, t.dk, to.queries + int64_t(i) * to.wide_dk);
    }
  });
}

// `whole`: nobody will ask whether they are finite.
void take_values(const DenseTask& t, int64_t start, int n, bool whole, Packed& to) {
  // A row ends where the next begins, so that whole vectors stay within the array.
  const bool dense = t.v.stride == t.dv && t.dv == to.wide_dv;
  if (t.v.dtype == Dtype::f32 && dense && n == kPageTokens) {
    to.values = static_cast<const float*>(t.v.data) + start * t.v.stride;
    to.finite = whole || all_finite(to.value_rows(), 0, n, t.dv);
    return;
  }
  to.values = to.copies;
  with_rows(t.v.data, t.v.dtype, t.v.stride, [&](auto row) {
    to.finite = pack_rows([&](int j) { return row(start + j); }, n, t.dv, to.wide_dv, to.copies);
  });
  for (int64_t i = int64_t(n) * to.wide_dv; i < kPageTokens * to.wide_dv; i += 16)
    store(to.copies + i, zero());
}

// Vectors [first, first + R) of the task with the packed keys [start, start + n).
template <int R>
void visit_block(const DenseTask& t, const Packed& packed, int64_t start, int n, int32_t first,
                 float* states) {
  Visit<R, float> at(t, start, first, packed.queries, packed.wide_dk, states);
  if (at.idle(t)) return;
  alignas(64) float s[R][kPageTokens];
  dots<R>(packed.keys, t.dk, at.q, s);
  soften_scores<R>(t, nullptr, nullptr, at.vector, start, n, at.seen, at.state, s);
  add_seen<R>(
      packed.value_rows(), packed.wide_dv, [&] { return packed.finite; }, at.seen, at.state, s);
}

// The same where they see all of the block, and their scores are plain.
template <int R>
void visit_whole(const DenseTask& t, const Packed& packed, int64_t start, int32_t first,
                 float* states) {
  const Vectors<R, float> at(t, first, packed.queries, packed.wide_dk, states);
  alignas(64) float s[R][kPageTokens];
  dots<R>(packed.keys, t.dk, at.q, s);
  if (soften_whole<R>(scaled_by(t.scale), t.dv, at.state, s))
    add_values<R>(packed.value_rows(), packed.wide_dv, 0, kPageTokens, at.state, s);
  else
    visit_block<R>(t, packed, start, kPageTokens, first, states);
}

void dense_chunk(const DenseTask& t, int64_t chunk, float* states, float* scratch) {
  clear_states(states, t.count, t.dv);
  Packed packed(t, scratch);
  pack_queries(t, packed);
  const auto [low, high] = blocks_of(t, chunk);
  if (t.count <= kInPlaceVectors)
    return chunk_in_place(t, low, high, packed.queries, packed.wide_dk, states);
  const bool simple = plain_weights(t);
  const auto rows = [&](int64_t v) { return v * kPageTokens / t.count; };
  for (int64_t start = low; start < high; start += kPageTokens) {
    const int n = within_page(t.keys, start);
    pack_tiles(t.k, start, n, t.dk, packed.keys);
    take_values(t, start, n, see_whole(t, 0, t.count, start), packed);
    for (int32_t v = 0; v < t.count; v += kSharing) {
      // The next block's rows come from memory while this one's are worked on.
      for (int64_t i = rows(v); i < rows(v + kSharing); ++i)
        prefetch_row(t, start + kPageTokens + i);
      with_count<kSharing>(t.count - v, [&]<int R> {
        if (simple && see_whole(t, v, v + R, start))
          visit_whole<R>(t, packed, start, v, states);
        else
          visit_block<R>(t, packed, start, n, v, states);
      });
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
