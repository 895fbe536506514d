#include <immintrin.h>

#include "base/types.h"

namespace bitnet {
namespace {

// A run of bytes in whole vectors and one masked store.
BITNET_INLINE void fill_bytes(uint8_t* p, int64_t n, uint32_t bits) {
  const __m512i v = _mm512_set1_epi32(int(bits));
  int64_t i = 0;
  for (; i + 256 <= n; i += 256) {
    _mm512_storeu_si512(p + i, v);
    _mm512_storeu_si512(p + i + 64, v);
    _mm512_storeu_si512(p + i + 128, v);
    _mm512_storeu_si512(p + i + 192, v);
  }
  for (; i + 64 <= n; i += 64) _mm512_storeu_si512(p + i, v);
  if (i < n) _mm512_mask_storeu_epi8(p + i, (1ull << (n - i)) - 1, v);
}

}  // namespace
}  // namespace bitnet

#include "mask/rows.h"

namespace bitnet {

const MaskKernels mask_avx512 = {"avx512", fill_rows};

}  // namespace bitnet
