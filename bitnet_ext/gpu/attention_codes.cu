// Vectors of attention as int8 codes of a scale each (codes.cuh).
#include "codes.cuh"
#include "kinds.cuh"

constexpr int kWarps = 8;

// codes = rint(x * 127 / max|x|), scale = max|x| / 127 of each row. A warp has a row; grid (batch x
// ceil(heads x rows / kWarps)).
__global__ void __launch_bounds__(32 * kWarps)
    quantise_heads(const void* x, int32_t kind, int64_t batch, int64_t head, int64_t row,
                   int32_t heads, int32_t rows, int32_t width,
                   int8_t* codes,  // [batch][heads][rows][padded], zeros past the width
                   float* scales,  // [batch][heads][whole_words(rows)]
                   int32_t padded) {
  const int32_t blocks = (heads * rows + kWarps - 1) / kWarps;
  const int32_t own = int32_t(blockIdx.x) % blocks * kWarps + int32_t(threadIdx.x) / 32;
  if (own >= heads * rows) return;
  const int64_t entry = blockIdx.x / blocks, to = entry * heads * rows + own;
  const int64_t from = entry * batch + own / rows * head + own % rows * row;
  const auto element = [&](int32_t i) {
    if (kind == kF32) return static_cast<const float*>(x)[from + i];
    if (kind == kF16) return to_float(static_cast<const half_t*>(x)[from + i]);
    return to_float(static_cast<const bfloat_t*>(x)[from + i]);
  };
  store_codes(element, width, codes + to * padded, padded,
              scales + to / rows * whole_words(rows) + to % rows);
}
