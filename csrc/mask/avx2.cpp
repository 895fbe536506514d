#include <immintrin.h>

#include "base/types.h"

namespace bitnet {
namespace {

using Words = __m256i;
constexpr int kWords = 8;

BITNET_INLINE Words set1(int32_t x) { return _mm256_set1_epi32(x); }
BITNET_INLINE Words indices() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
BITNET_INLINE void store(uint8_t* p, Words a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
}
BITNET_INLINE Words pick(Words index, Words count, Words a, Words b) {
  return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi32(count, index));
}

}  // namespace
}  // namespace bitnet

#include "mask/rows.h"

namespace bitnet {

const MaskKernels mask_avx2 = {"avx2", fill};

}  // namespace bitnet
