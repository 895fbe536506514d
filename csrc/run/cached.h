// Attention over the paged KV cache: rows of q | k | v appended, then attended to, on all threads.
#pragma once
#include "attention/kv_cache.h"
#include "base/matrix_rows.h"

namespace bitnet {

struct HeadCounts {
  int32_t q, kv;
};
// [P, dk / 2] each, by position; without data: no rotation.
struct RopeRows {
  Rows<float> cos, sin;
};

// Rotates q and k of each row in place, and writes k and v to the pages of its sequence.
struct AppendCall {
  Rows<float> qkv;
  HeadCounts heads;
  RopeRows rope;
  const KVCache* cache;
  int64_t layer;
  const int32_t *seq, *pos;  // [rows]
};
void run_append(const AppendCall& a);

// out row i = attention of row i's q over the cached keys of its sequence up to its own position.
struct AttendCall {
  Rows<float> qkv;
  HeadCounts heads;
  const KVCache* cache;
  int64_t layer;
  const int32_t* starts;     // [batch + 1] first row of each sequence
  const int32_t* first_pos;  // [batch] position of that row
  float scale;
  int32_t window_left;  // keys before a row's own that it sees; negative: all
  Rows<float> out;      // [rows, q heads * dv]
  bool prefill;         // part of a call of several tokens for a sequence: for the metrics
};
void run_attend(const AttendCall& a);

}  // namespace bitnet
