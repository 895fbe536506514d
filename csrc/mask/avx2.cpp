#include <immintrin.h>

#include "base/types.h"

namespace bitnet {
namespace {

// A run of bytes in whole vectors; the last one overlaps the one before it, which holds the same.
BITNET_INLINE void fill_bytes(uint8_t* p, int64_t n, uint32_t bits) {
  const __m256i v = _mm256_set1_epi32(int(bits));
  if (n >= 32) {
    int64_t i = 0;
    for (; i + 128 <= n; i += 128) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i), v);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i + 32), v);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i + 64), v);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i + 96), v);
    }
    for (; i + 32 <= n; i += 32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i), v);
    // n and 32 are multiples of the element size, so the pattern stays in step.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + n - 32), v);
    return;
  }
  for (int64_t i = 0; i < n; ++i) p[i] = uint8_t(bits >> (8 * (i & 3)));
}

}  // namespace
}  // namespace bitnet

#include "mask/rows.h"

namespace bitnet {

const MaskKernels mask_avx2 = {"avx2", fill_rows};

}  // namespace bitnet
