// Attention over dense arrays of any strides, with every option of the field.
//
//   raw[j]  = (q . k[j]) * scale
//   s[j]    = softcap * tanh(raw[j] / softcap) + mask[j]
//   p       = softmax(s),  out = sum p[j] v[j],  dropout: p[j] v[j] kept / (1 - dropout_p)
// A key is seen where position, lengths and mask allow it and s[j] is not -inf; others are skipped,
// never multiplied. Row i stands at i + offset and sees keys [i + offset - left, i + offset +
// right]. A row that sees no key gives zeros. State, blocks and merging are those of attention.h:
// nothing depends on which rows, heads or chunks run together.
//
// int8: attention_int8/attention_int8.h.
// Philox4x32-10 with the key `seed` (low word first) decides dropout: for key j of a row at
// position t and query head h, word j / 16 % 4 at counter (j / 64 * 16 + j % 16, t, h, 0); dropped
// when its top 24 bits are below `dropped`.
#pragma once
#include "base/types.h"

namespace bitnet {

constexpr int64_t kFar = int64_t(1) << 40;  // positions, lengths and windows stay below it

enum class MaskKind : int32_t { none, boolean, f32, f16, bf16 };
enum class ScoreKind : int32_t { none, raw, softcap, mask, softmax };

// Rows of contiguous elements; strides in elements.
struct DenseRows {
  const void* data;
  Dtype dtype;
  int64_t stride, head_stride;
};

// Query vectors [first, first + count) of one batch entry and kv head: vector v is query head
// v % group of row v / group.
struct DenseTask {
  DenseRows q, k, v;  // q: row 0, first query head of the group; k, v: row 0 of the kv head
  int32_t dk, dv, group;
  int32_t first_head;  // of the group, among all query heads
  int64_t first;
  int32_t count;
  int64_t keys, valid;  // rows of k and v; those below `valid` may be seen
  int64_t offset, left, right;
  float scale, softcap;  // softcap 0: none
  bool int8;
  MaskKind mask_kind;
  const void* mask;                           // row 0, first head, key 0
  int64_t mask_stride, mask_head, mask_step;  // from key to key; 0: one value for all of a row
  float dropped, kept_scale;                  // rint(2^24 p), 1 / (1 - p); 0, 1: no dropout
  uint64_t seed;
  ScoreKind score_kind;
  float* scores;  // [.., keys], row 0 of the first head
  int64_t score_stride, score_head;
  float* out;  // row 0 of the first head
  int64_t out_stride, out_head;
};

// Keys [low, high) that position and length let a row see; nothing when high <= low.
struct Extent {
  int64_t low, high;
};
BITNET_INLINE Extent extent_of(const DenseTask& t, int64_t row) {
  const int64_t own = row + t.offset, low = own - t.left, high = own + t.right + 1;
  return {low < 0 ? 0 : low, high < t.valid ? high : t.valid};
}
// Those that the task's rows visit: all when scores are asked for.
BITNET_INLINE Extent keys_of(const DenseTask& t) {
  if (t.score_kind != ScoreKind::none) return {0, t.keys};
  return {extent_of(t, t.first / t.group).low,
          extent_of(t, (t.first + t.count - 1) / t.group).high};
}

// Floats of scratch that a task of `count` vectors needs beside its states: 64 keys and values, and
// the queries; as int8 codes with their scales these take less.
BITNET_INLINE int64_t dense_scratch_floats(int32_t count, int32_t dk, int32_t dv) {
  const int64_t wide_dk = (int64_t(dk) + 15) / 16 * 16, wide_dv = (int64_t(dv) + 15) / 16 * 16;
  return 64 * (wide_dk + wide_dv) + count * wide_dk + 16;
}

}  // namespace bitnet
