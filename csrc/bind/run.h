// Kernels as both the Python bindings and the C ABI run them: counted, on all threads, without the
// interpreter. Arguments are checked by the caller.
#pragma once
#include "mask/fill.h"
#include "rowwise/rowwise.h"
#include "ternary/product.h"

namespace bitnet {

// `rows` rows of `width` elements, `stride` bytes apart.
void run_mask_fill(void* out, MaskElement element, const MaskSizes& sizes, int64_t rows,
                   int64_t width, int64_t stride);
void run_norm_quant(const RowsIn& x, const Norm& norm, const Quantised& out, int64_t rows);
// As ternary_product.
void run_ternary(const TernaryMatrix& w, const TernaryProduct& p);

}  // namespace bitnet
