// Which keys a vector of dense attention sees, their scores and weights, over F16; the arithmetic
// stands in dense.h. Include what blocks.h wants first.
#pragma once
#include "attention/blocks.h"
#include "attention/dropout.h"
#include "attention/pack_dense.h"

namespace bitnet {
namespace {

// A vector's place: its row, and its head within the group.
struct Vector {
  int64_t row, head;
};
BITNET_INLINE Vector vector_at(const DenseTask& t, int64_t i) {
  const int64_t v = t.first + i;
  return t.group == 1 ? Vector{v, 0} : Vector{v / t.group, v % t.group};
}

// Eight bytes -> a bit each, set where the byte is not zero.
BITNET_INLINE uint64_t byte_bits(uint64_t bytes) {
  const uint64_t low = 0x7f7f7f7f7f7f7f7full;
  const uint64_t set = ((((bytes & low) + low) | bytes) >> 7) & 0x0101010101010101ull;
  return (set * 0x0102040810204080ull) >> 56;
}

// The part of a boolean mask row that falls on keys [start, start + n).
BITNET_INLINE uint64_t boolean_bits(const DenseTask& t, Vector v, int64_t start, int n) {
  const uint8_t* row =
      static_cast<const uint8_t*>(t.mask) + v.row * t.mask_stride + v.head * t.mask_head;
  if (t.mask_step == 0) return *row ? ~0ull : 0;
  uint64_t words[8] = {}, bits = 0;
  if (t.mask_step == 1) {
    __builtin_memcpy(words, row + start, uint64_t(n));
  } else {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(words);
    for (int i = 0; i < n; ++i) bytes[i] = row[(start + i) * t.mask_step];
  }
  for (int i = 0; i < 8; ++i) bits |= byte_bits(words[i]) << (8 * i);
  return bits;
}

BITNET_INLINE Dtype mask_dtype(MaskKind kind) {
  return kind == MaskKind::f32 ? Dtype::f32 : kind == MaskKind::f16 ? Dtype::f16 : Dtype::bf16;
}

// Keys [key, key + n) of an additive mask's row, whose values stand at p, `step` apart.
template <class Row, class T>
BITNET_INLINE F16 mask_values(Row row, const T* p, int64_t step, int64_t key, int n) {
  if (step == 1) return n == 16 ? row.at(key, Whole{}) : row.at(key, Part{n});
  alignas(64) T values[16] = {};
  if (step == 0) {
    for (int i = 0; i < 16; ++i) values[i] = *p;
  } else {
    for (int i = 0; i < n; ++i) values[i] = p[(key + i) * step];
  }
  return Row{values}.at(0, Whole{});
}

// x plus the additive mask on keys [key, key + n); where that is -inf, -inf whatever x is.
BITNET_INLINE F16 add_mask(const DenseTask& t, Vector v, int64_t key, int n, F16 x) {
  const F16 never = set1(-__builtin_inff());
  with_rows(t.mask, mask_dtype(t.mask_kind), 1, [&](auto at) {
    const auto row = at(v.row * t.mask_stride + v.head * t.mask_head);
    const F16 mask = mask_values(row, row.p, t.mask_step, key, n);
    x = select(eq(mask, never), never, add(x, mask));
  });
  return x;
}

// Whether a score is its dot product scaled, with nothing added and nobody else to be told.
BITNET_INLINE bool plain(const DenseTask& t) {
  return t.softcap == 0.0f && t.mask_kind <= MaskKind::boolean && t.score_kind == ScoreKind::none;
}
// And no weight is dropped: what soften_whole takes where vectors see all of a block.
BITNET_INLINE bool plain_weights(const DenseTask& t) { return plain(t) && t.dropped == 0.0f; }
// `key_scales`: int8 only, else null.
BITNET_INLINE uint64_t scale_scores(const DenseTask& t, const float* key_scales, float query_scale,
                                    uint64_t seen, float* s) {
  const F16 never = set1(-__builtin_inff());
  const F16 factor = set1(key_scales ? query_scale * t.scale : t.scale);
  M16 hidden[kPageTiles];
  for (int i = 0; i < kPageTiles; ++i) {
    F16 x = load(s + 16 * i);
    if (key_scales) x = mul(x, load(key_scales + 16 * i));
    x = select(seen_keys(seen, i), mul(x, factor), never);
    store(s + 16 * i, x);
    hidden[i] = eq(x, never);
  }
  const M16 any = mask_or(mask_or(hidden[0], hidden[1]), mask_or(hidden[2], hidden[3]));
  if (mask_bits(any))
    for (int i = 0; i < kPageTiles; ++i) seen &= ~(uint64_t(mask_bits(hidden[i])) << (16 * i));
  return seen;
}

// The dot products of one vector with keys [start, start + n) become scores, -inf where a key is
// not seen; returns the keys that are. `slopes`, where given: how fast the cap lets scores grow.
BITNET_INLINE uint64_t score(const DenseTask& t, const float* key_scales, Vector v,
                             float query_scale, uint64_t seen, int64_t start, int n, float* s,
                             float* slopes) {
  const F16 never = set1(-__builtin_inff());
  const F16 factor = set1(key_scales ? query_scale * t.scale : t.scale);
  const ScoreKind kind = t.score_kind;
  const float cap = t.softcap;
  const bool additive = t.mask_kind > MaskKind::boolean;
  const int masked = within_page(t.valid, start);
  float* scores = kind == ScoreKind::none
                      ? nullptr
                      : t.scores + v.row * t.score_stride + v.head * t.score_head + start;
  uint64_t hidden = 0;
  for (int i = 0; i < kPageTiles; ++i) {
    const int lanes = tile_lanes(n, i);
    F16 x = load(s + 16 * i);
    if (key_scales) x = mul(x, load(key_scales + 16 * i));
    x = mul(x, factor);
    if (kind == ScoreKind::raw) store_partial(scores + 16 * i, x, lanes);
    if (cap > 0.0f) {
      const F16 y = tanh(div(x, set1(cap)));
      x = mul(set1(cap), y);
      if (slopes) store(slopes + 16 * i, sub(set1(1.0f), mul(y, y)));
    }
    if (kind == ScoreKind::softcap) store_partial(scores + 16 * i, x, lanes);
    if (additive) x = add_mask(t, v, start + 16 * i, tile_lanes(masked, i), x);
    x = select(seen_keys(seen, i), x, never);
    if (kind >= ScoreKind::mask) store_partial(scores + 16 * i, x, lanes);
    store(s + 16 * i, x);
    hidden |= uint64_t(mask_bits(eq(x, never))) << (16 * i);
  }
  return seen & ~hidden;
}

// The weights that multiply the values of tile `i`: some dropped, the rest larger.
BITNET_INLINE F16 drop(const DenseTask& t, const Philox& random, int i, F16 p) {
  const M16 kept = le(set1(t.dropped), top_bits(random.words[i]));
  return select(kept, mul(p, set1(t.kept_scale)), zero());
}
BITNET_INLINE Philox random_of(const DenseTask& t, Vector v, int64_t start) {
  return philox(uint32_t(start / 4), uint32_t(v.row + t.offset), uint32_t(t.first_head + v.head),
                t.seed);
}

// Dot products of R vectors with keys [start, start + n) become weights, their states' m and l move
// on, and `seen` loses keys whose scores are -inf. int8 only, else null: the scales of the block's
// keys and of the vectors' queries.
template <int R>
BITNET_INLINE void soften_scores(const DenseTask& t, const float* key_scales,
                                 const float* query_scales, const Vector* vectors, int64_t start,
                                 int n, uint64_t* seen, float* const* states,
                                 float (*s)[kPageTokens]) {
  const bool simple = plain(t);
  for (int r = 0; r < R; ++r) {
    const float query_scale = key_scales ? query_scales[r] : 1.0f;
    seen[r] = simple
                  ? scale_scores(t, key_scales, query_scale, seen[r], s[r])
                  : score(t, key_scales, vectors[r], query_scale, seen[r], start, n, s[r], nullptr);
  }
  Philox random[R];
  if (t.dropped > 0.0f)
    for (int r = 0; r < R; ++r) random[r] = random_of(t, vectors[r], start);
  soften<R>(states, seen, t.dv, s,
            [&](int r, int i, F16 p) { return t.dropped > 0.0f ? drop(t, random[r], i, p) : p; });
}

// Weights times 64 rows of values, those of row(j) `width` wide. A hidden key's weight is 0, which
// leaves o alone when the values are finite; when they are not, runs of seen keys are added one
// vector at a time. Both give the same sums, but for the sign of a zero, which adding + 0 at the
// end settles. `finite` is asked only where a vector does not see a key between others' first and
// last.
template <int R, class Row, class Finite>
void add_seen(Row row, int32_t width, Finite finite, const uint64_t* seen, float* const* states,
              float (*p)[kPageTokens]) {
  uint64_t any = 0, all = ~0ull;
  for (int r = 0; r < R; ++r) any |= seen[r], all &= seen[r];
  if (!any) return;
  const int low = __builtin_ctzll(any), high = int(kPageTokens) - __builtin_clzll(any);
  if (all != key_bits(low, high) && !finite()) {
    for (int r = 0; r < R; ++r)
      for (uint64_t left = seen[r]; left;) {
        const int first = __builtin_ctzll(left);
        const uint64_t run = ~(left >> first);
        const int last = run ? first + __builtin_ctzll(run) : int(kPageTokens);
        add_values<1>(row, width, first, last, states + r, p + r);
        left &= ~key_bits(first, last);
      }
    return;
  }
  for (int r = 0; r < R; ++r) {
    if (seen[r]) continue;
    for (int i = 0; i < kPageTiles; ++i) store(p[r] + 16 * i, zero());
  }
  add_values<R>(row, width, low, high, states, p);
}

// Whether the task's vectors [first, end) see all keys [start, start + 64): extents ascend.
BITNET_INLINE bool see_whole(const DenseTask& t, int32_t first, int32_t end, int64_t start) {
  return t.mask_kind == MaskKind::none &&
         extent_of(t, (t.first + first) / t.group).high >= start + kPageTokens &&
         extent_of(t, (t.first + end - 1) / t.group).low <= start;
}

// The blocks of a chunk that the task's rows visit: keys [low, high), low a multiple of 64.
BITNET_INLINE Extent blocks_of(const DenseTask& t, int64_t chunk) {
  const Extent keys = keys_of(t);
  const int64_t begin = chunk * kChunkTokens, end = begin + kChunkTokens;
  return {(keys.low > begin ? keys.low : begin) / kPageTokens * kPageTokens,
          keys.high < end ? keys.high : end};
}

// Keys of the 64 from `start` on that position, length and a boolean mask let a vector see.
BITNET_INLINE uint64_t seen_by(const DenseTask& t, Vector v, int64_t start) {
  const Extent extent = extent_of(t, v.row);
  const uint64_t seen = key_bits(within_page(extent.low, start), within_page(extent.high, start));
  if (!seen || t.mask_kind != MaskKind::boolean) return seen;
  return seen & boolean_bits(t, v, start, within_page(t.valid, start));
}

// R vectors of a task, from `first` on: their queries, `width` apart in the task's own form, and
// their states.
template <int R, class Q>
struct Vectors {
  const Q* q[R];
  float* state[R];

  BITNET_INLINE Vectors(const DenseTask& t, int32_t first, const Q* queries, int32_t width,
                        float* states) {
    for (int r = 0; r < R; ++r) {
      q[r] = queries + int64_t(first + r) * width;
      state[r] = states + (first + r) * state_floats(t.dv);
    }
  }
};

// The same at the block of keys from `start` on, and the keys they see.
template <int R, class Q>
struct Visit : Vectors<R, Q> {
  Vector vector[R];
  uint64_t seen[R], any = 0;

  BITNET_INLINE Visit(const DenseTask& t, int64_t start, int32_t first, const Q* queries,
                      int32_t width, float* states)
      : Vectors<R, Q>(t, first, queries, width, states) {
    for (int r = 0; r < R; ++r) {
      vector[r] = vector_at(t, first + r);
      seen[r] = seen_by(t, vector[r], start);
      any |= seen[r];
    }
  }
  // Nobody sees a key or reads a score.
  BITNET_INLINE bool idle(const DenseTask& t) const {
    return !any && t.score_kind == ScoreKind::none;
  }
};

}  // namespace
}  // namespace bitnet
