// The screen's dot product on 512 bits: as dot256.h.
#pragma once
#include "base/lanes_avx512.h"
#include "screen/screen_impl.h"

namespace bitnet {
namespace {

struct Dot512 {
  static constexpr int bytes = 64, lines = 5;
  static BITNET_INLINE __m512i load(const void* p) { return _mm512_loadu_si512(p); }
  static BITNET_INLINE __m512i low_half(__m512i c) {
    return _mm512_and_si512(c, _mm512_set1_epi8(15));
  }
  static BITNET_INLINE __m512i high_half(__m512i c) { return low_half(_mm512_srli_epi16(c, 4)); }
  static BITNET_INLINE __m512i zero() { return _mm512_setzero_si512(); }
  static BITNET_INLINE __m512i add(__m512i sums, __m512i nibbles, const int8_t* x) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sums, nibbles, load(x));
#else
    const __m512i pairs = _mm512_maddubs_epi16(nibbles, load(x));
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
  }
  static BITNET_INLINE int32_t total(__m512i sums) { return _mm512_reduce_add_epi32(sums); }
};

}  // namespace
}  // namespace bitnet
