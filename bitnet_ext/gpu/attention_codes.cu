// Vectors of attention as int8 codes of a scale each (codes.cuh).
#include "codes.cuh"
#include "kinds.cuh"

// codes = rint(x * 127 / max|x|), scale = max|x| / 127 of each row. grid (batch x heads x rows), a
// warp a row.
__global__ void __launch_bounds__(32)
    quantise_heads(const void* x, int32_t kind, int64_t batch, int64_t head, int64_t row,
                   int32_t heads, int32_t rows, int32_t width,
                   int8_t* codes,  // [batch][heads][rows][padded], zeros past the width
                   float* scales,  // [batch][heads][whole_words(rows)]
                   int32_t padded) {
  const int64_t to = blockIdx.x;
  const int64_t from = to / rows / heads * batch + to / rows % heads * head + to % rows * row;
  const auto element = [&](int32_t i) {
    if (kind == kF32) return static_cast<const float*>(x)[from + i];
    if (kind == kF16) return to_float(static_cast<const half_t*>(x)[from + i]);
    return to_float(static_cast<const bfloat_t*>(x)[from + i]);
  };
  store_codes(element, width, codes + to * padded, padded,
              scales + to / rows * whole_words(rows) + to % rows);
}
