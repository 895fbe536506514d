#include <immintrin.h>

#include "base/types.h"

namespace bitnet {
namespace {

using Words = __m512i;
constexpr int kWords = 16;

BITNET_INLINE Words set1(int32_t x) { return _mm512_set1_epi32(x); }
BITNET_INLINE Words indices() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
BITNET_INLINE void store(uint8_t* p, Words a) { _mm512_storeu_si512(p, a); }
BITNET_INLINE Words pick(Words index, Words count, Words a, Words b) {
  return _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(index, count), b, a);
}

}  // namespace
}  // namespace bitnet

#include "mask/rows.h"

namespace bitnet {

const MaskKernels mask_avx512 = {"avx512", fill};

}  // namespace bitnet
