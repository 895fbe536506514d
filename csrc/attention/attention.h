// Causal attention over a paged KV cache, and the op that fills it.
//
// A page holds 64 tokens of one layer, sequence and kv head:
//   K   tiles [4][dk][16]: lane = key mod 16, so scores are vectors of 16 keys
//   V   [64][dv]
//   int8 only: float k_scale[64], v_scale[64]: value = int8 * scale
// The pages of a sequence's 64 tokens for all layers and kv heads stand side by side in one slab:
// page = slab[token / 64] + (layer * kv_heads + head) * page_bytes.
//
// Arithmetic (contract 3). A query vector is one head of one row. Per vector a state (m, l, o)
// starts at every 512th absolute key, and goes over pages in ascending order:
//   s[j] = (q . k[j]) * scale       sequential FMA over dk; int8: (dot * k_scale[j]) * scale
//   m'   = max(m, max s),  c = exp(m - m'),  p[j] = exp(s[j] - m')
//   l    = l * c + p                16 partial sums, lane = key mod 16
//   o    = o * c + sum p[j] v[j]    sequential FMA over keys; int8: p[j] * v_scale[j] first
// Keys that the vector may not see are skipped, never multiplied; a page without visible keys
// leaves the state alone. The states of chunks merge in ascending order, then out = o / sum(l).
// Nothing depends on which vectors or chunks run together.
#pragma once
#include "attention/backward.h"
#include "attention/dense.h"
#include "base/types.h"

namespace bitnet {

constexpr int64_t kPageTokens = 64;
constexpr int64_t kChunkTokens = 512;
constexpr int32_t kTileVectors = 6;    // query vectors that share one pass over a page
constexpr int32_t kMaxHeadDim = 1024;  // so that a tile's states fit a thread's stack
constexpr int32_t kStateHeader = 32;   // floats before o: m, seen, 14 unused, l[16]

BITNET_INLINE int64_t state_floats(int32_t dv) {
  return kStateHeader + (int64_t(dv) + 15) / 16 * 16;
}
BITNET_INLINE int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 ? 1 : 2;
}
BITNET_INLINE int64_t page_bytes(Dtype dtype, int32_t dk, int32_t dv) {
  const int64_t scales = dtype == Dtype::i8 ? 2 * 4 : 0;
  return kPageTokens * ((int64_t(dk) + dv) * element_bytes(dtype) + scales);
}

// Query vectors [first, first + count) of one sequence and kv head: vector v is query head
// v % group of row v / group, which stands at position first_pos + v / group.
struct AttendTask {
  const uint8_t* const* slabs;  // of the sequence
  int64_t page_offset;          // of the layer and kv head in a slab
  Dtype dtype;
  int32_t dk, dv;
  const float* q;  // row 0, first query head of the group
  int64_t q_stride;
  int32_t group, first_pos, first, count;
  int32_t window_left;  // keys before a row's own that it sees; negative: all
  float scale;
};

// One row of q | k | v. Writes rotated q and k back into the row, and k and v into the pages.
struct AppendTask {
  float* row;
  const float *cos, *sin;  // [dk / 2] of the row's position, or null: no rotation
  uint8_t* page;           // of kv head 0; the others follow page_bytes apart
  Dtype dtype;
  int32_t slot;  // position mod 64
  int32_t q_heads, kv_heads, dk, dv;
};

struct AttentionKernels {
  const char* isa;
  void (*append)(const AppendTask& task);
  // States [count][state_floats(dv)] of the task's vectors over keys [512 chunk, 512 chunk + 512).
  void (*chunk)(const AttendTask& task, int64_t chunk, float* states);
  // total = total then part, for `count` states.
  void (*merge)(float* total, const float* part, int32_t count, int32_t dv);
  // Row v / group, head v % group of `out` (row 0, first head) from the state of vector v.
  void (*finish)(const AttendTask& task, const float* states, float* out, int64_t out_stride);
  // chunk and finish over dense arrays; the states merge by `merge`.
  void (*dense_chunk)(const DenseTask& task, int64_t chunk, float* states, float* scratch);
  void (*dense_finish)(const DenseTask& task, const float* states);
  // backward.h. The statistics of the task's vectors from their final states; then, in any order,
  // dq of the task's vectors, and dk and dv of keys [start, start + 64), start a multiple of 64,
  // for a task of all vectors of the kv head.
  void (*backward_stats)(const BackwardTask& task, const float* states);
  void (*backward_queries)(const BackwardTask& task, float* scratch);
  void (*backward_keys)(const BackwardTask& task, int64_t start, float* scratch);
};

extern const AttentionKernels attention_scalar;
extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;

}  // namespace bitnet
