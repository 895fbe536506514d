// Kernels as the bindings, the C ABI and the layers run them: counted, on all threads, without the
// interpreter. Arguments are checked by the caller.
#pragma once
#include "base/matrix_rows.h"
#include "mask/fill.h"
#include "rowwise/rowwise.h"
#include "ternary/product.h"

namespace bitnet {

constexpr int64_t kTaskElements = 16384;  // about 2 us of row-wise work

// `rows` rows of `width` elements, `stride` bytes apart.
void run_mask_fill(void* out, MaskElement element, const MaskSizes& sizes, int64_t rows,
                   int64_t width, int64_t stride);
void run_norm(const Rows<float>& x, const Norm& norm, const NormStats& stats, const RowsOut& out);
void run_norm_quant(const RowsIn& x, const Norm& norm, const Quantised& out, int64_t rows);
void run_quantise(const RowsIn& x, const int32_t* tops, const Quantised& out, int64_t rows);
// x holds gate | up when `gated`.
void run_act_quant(const Rows<float>& x, Activation act, bool gated, const Norm& norm,
                   const Quantised& out);
// As ternary_product.
void run_ternary(const TernaryMatrix& w, const TernaryProduct& p);
// As has_activation and ternary_activated.
bool runs_activation(const TernaryMatrix& w, int64_t rows, bool gated);
void run_ternary_activated(const TernaryMatrix& w, const TernaryProduct& p,
                           const TernaryActivation& a);

// float32 [batch, heads, rows, size] with contiguous vectors; strides in elements.
struct HeadsView {
  float* data;
  int64_t heads, rows, size, batch_stride, head_stride, row_stride;
};
struct AttentionCall {
  HeadsView q, k, v, out;
  int64_t batch;
  const int64_t* kv_lengths;  // [batch] or null
  bool causal;
  int64_t past, left, right;  // extents of the window; negative: unbounded
  float scale, softcap;       // softcap 0: none
};
void run_attention(const AttentionCall& a);

}  // namespace bitnet
