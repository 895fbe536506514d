// Gradients of attention over dense arrays (dense.h) by recomputation in blocks (FlashAttention-2,
// arXiv:2307.08691). With s, p and the dropout of the forward pass, and m and l of a whole row:
//
//   p[j]  = exp(s[j] - m) * (1 / l)        w[j] = p[j] kept / (1 - dropout_p)
//   D     = d_out . out                    sequential FMA in 16 lanes, one tree
//   ds[j] = p[j] ((d_out . v[j]) kept / (1 - dropout_p) - D) (1 - tanh^2(raw[j] / softcap)) scale
//   dq    = sum ds[j] k[j]                 over keys, ascending
//   dk[j] = sum ds[j] q                    over rows ascending, in each the heads of the group
//   dv[j] = sum w[j] d_out                 likewise
// Each sum is one sequential FMA, whoever computes it: dq goes query by query, dk and dv key by
// key, added to what their arrays hold, so that calls on the parts of the queries in order give the
// bits of one call on all. Keys that a row does not see are skipped, and so are rows that see none.
#pragma once
#include "attention/dense.h"

namespace bitnet {

constexpr int32_t kStatFloats = 4;  // m, 1 / l, D of a query vector; all 0 when it sees no key

struct BackwardTask {
  DenseTask forward;  // `out` and scores unused; never int8
  DenseRows d_out;    // row 0, first head of the group
  float* stats;       // [rows * group][kStatFloats] of the kv head
  float* dq;          // row 0, first head of the group
  float *dk, *dv;     // row 0 of the kv head
  int64_t dq_stride, dq_head, dk_stride, dv_stride;
};

// Floats of scratch: for the dq of `count` vectors, and for dk and dv of 64 keys.
BITNET_INLINE int64_t backward_query_floats(int32_t count, int32_t dk, int32_t dv) {
  const int64_t wide_dk = (int64_t(dk) + 15) / 16 * 16, wide_dv = (int64_t(dv) + 15) / 16 * 16;
  return 64 * (2 * wide_dk + wide_dv) + count * (2 * wide_dk + wide_dv + 32);
}
BITNET_INLINE int64_t backward_key_floats(int32_t dk, int32_t dv) {
  const int64_t wide_dk = (int64_t(dk) + 15) / 16 * 16, wide_dv = (int64_t(dv) + 15) / 16 * 16;
  return 64 * (3 * (wide_dk + wide_dv) + 2 * 32 + 2 * 64);
}

}  // namespace bitnet
