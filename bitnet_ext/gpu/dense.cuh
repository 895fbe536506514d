// Attention over arrays of any strides: a block's task, which keys its queries see, and what
// becomes of a dot product; the formulas of csrc/attention/dense.h. Query vector v of a kv head is
// query head v % group of row v / group.
#pragma once
#include "codes.cuh"
#include "flash.cuh"
#include "philox.cuh"

enum MaskKind : int32_t { kNone, kBool, kMaskF32, kMaskF16, kMaskBf16 };
enum ScoreKind : int32_t { kNoScores, kRaw, kSoftcap, kMask, kSoftmax };

// [batch][heads][rows][..], contiguous columns; strides in elements.
struct Rows {
  const void* data;
  int32_t kind;
  int64_t batch, head, row;
};

struct Task {
  Rows q, k, v;
  // int8: [batch][heads][whole_words(rows)], else null
  const float *q_scales, *k_scales, *v_scales;
  int32_t tq, tk, group, kv_heads, dk, dv;
  float scale, softcap;  // softcap 0: none
  const void* mask;
  int32_t mask_kind;
  int64_t mask_batch, mask_head, mask_row, mask_step;  // step 0: one value for all keys of a row
  int32_t mask_keys;                                   // that the mask reaches
  int32_t dropped;                                     // rint(2^24 p); 0: none
  float kept_scale;                                    // 1 / (1 - p)
  uint64_t seed;
  float* scores;  // [batch][q_heads][tq][tk]
  int32_t score_kind;

  int64_t left, right, offset;
  int32_t batch, kv_head, valid;  // of the block; keys from `valid` on are hidden

  // Whether a score is its dot product scaled, and nobody else is to be told.
  INLINE bool plain() const {
    return mask_kind == kNone && softcap == 0.0f && score_kind == kNoScores && !q_scales;
  }
  INLINE int32_t row(int32_t v) const { return v / group; }
  INLINE int32_t head(int32_t v) const { return kv_head * group + v % group; }
  // The row of [batch][q_heads][tq].
  INLINE int64_t out_row(int32_t v) const {
    return (int64_t(batch) * kv_heads * group + head(v)) * tq + row(v);
  }
};

// Keys [low, high) that position and length let a vector see.
struct Extent {
  int32_t low, high;
};
INLINE Extent extent_of(const Task& t, int32_t v) {
  const int64_t own = t.row(v) + t.offset;
  return {clamp(own - t.left, t.tk), clamp(own + t.right + 1, t.valid)};
}

// The block's sequence and kv head, and what follows from them.
INLINE void settle(
    Task& t, int32_t batch, int32_t kv_head,
    const int64_t* lengths,  // [batch] keys that exist, row 0 at length - tq; or null
    const uint64_t* seeds,   // [batch], or null: seed + b seed_step
    uint64_t seed_step) {
  t.batch = batch, t.kv_head = kv_head;
  t.seed = seeds ? seeds[batch] : t.seed + uint64_t(batch) * seed_step;
  t.valid = min(t.tk, t.mask_keys);
  if (!lengths) return;
  t.valid = min(t.valid, clamp(lengths[batch], t.tk));
  t.offset = lengths[batch] - t.tq;
}

// The mask's value for a vector and key; booleans are 0 or -inf.
INLINE float mask_of(const Task& t, int32_t v, int32_t key) {
  const int64_t i =
      t.batch * t.mask_batch + t.head(v) * t.mask_head + t.row(v) * t.mask_row + key * t.mask_step;
  if (t.mask_kind == kBool) return static_cast<const uint8_t*>(t.mask)[i] ? 0.0f : -INFINITY_F;
  if (t.mask_kind == kMaskF32) return static_cast<const float*>(t.mask)[i];
  if (t.mask_kind == kMaskF16) return to_float(static_cast<const half_t*>(t.mask)[i]);
  return to_float(static_cast<const bfloat_t*>(t.mask)[i]);
}

// The score of a dot product; -inf where the key is not seen. `slope`: how fast the cap lets it
// grow.
INLINE float score(const Task& t, int32_t v, int32_t key, bool in_reach, float dot, float& slope) {
  float* to = t.score_kind ? t.scores + t.out_row(v) * t.tk + key : nullptr;
  float factor = t.scale;
  if (t.q_scales) {
    const int64_t k_vectors = int64_t(t.batch) * t.kv_heads + t.kv_head;
    const int64_t q_vectors = int64_t(t.batch) * t.kv_heads * t.group + t.head(v);
    dot = mul_rn(dot, t.k_scales[k_vectors * whole_words(t.tk) + key]);
    factor = mul_rn(t.q_scales[q_vectors * whole_words(t.tq) + t.row(v)], t.scale);
  }
  float x = mul_rn(dot, factor);
  if (t.score_kind == kRaw) *to = x;
  slope = 1.0f;
  if (t.softcap > 0.0f) {
    const float y = tanh_rn(div_rn(x, t.softcap));
    x = mul_rn(t.softcap, y);
    slope = sub_rn(1.0f, mul_rn(y, y));
  }
  if (t.score_kind == kSoftcap) *to = x;
  if (in_reach && t.mask_kind != kNone) {
    const float mask = mask_of(t, v, key);
    x = mask == -INFINITY_F ? mask : t.mask_kind == kBool ? x : add_rn(x, mask);
  }
  if (!in_reach) x = -INFINITY_F;
  if (t.score_kind >= kMask) *to = x;
  return x;
}

// Bit i: the weight of key `key` + 16 i is kept; word i of a counter is for tile i of a block.
INLINE uint32_t kept_of(const Task& t, int32_t v, int32_t key) {
  const uint32_t first = uint32_t(key / kBlockKeys * kLanes + key % kLanes);
  const Philox random = philox(first, uint32_t(t.row(v) + t.offset), t.head(v), t.seed);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    bits |= uint32_t(int32_t(random.words[i] >> 8) >= t.dropped) << i;
  return bits;
}
