// Causal masks of the element types on offer, filled on all threads.
#pragma once
#include "mask/mask.h"

namespace bitnet {

// 0 where a query attends and -inf elsewhere, or 1 and 0.
enum class MaskElement : int32_t { f32, f16, boolean };

// Keys, queries and past beyond this could overflow their sums.
constexpr int64_t kMaskLimit = int64_t(1) << 60;

struct MaskSizes {
  int64_t q_len, k_len, past, left, prefix;
};
// Whether every size is in 0..kMaskLimit (left also kUnbounded).
bool mask_sizes_valid(const MaskSizes& sizes);

// `rows` rows of `width` elements, `stride` bytes apart; q_len <= rows, k_len <= width.
void mask_fill(const MaskKernels& kernels, void* out, MaskElement element, const MaskSizes& sizes,
               int64_t rows, int64_t width, int64_t stride);

int64_t mask_element_bytes(MaskElement element);

}  // namespace bitnet
