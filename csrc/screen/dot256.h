// The screen's dot product on 256 bits: vpdpbusd where there is one, else vpmaddubsw, whose pairs
// are at most 2 * 15 * 128 in magnitude, and vpmaddwd by ones.
#pragma once
#include "base/lanes_avx2.h"
#include "screen/screen_impl.h"

namespace bitnet {
namespace {

struct Dot256 {
  static constexpr int bytes = 32, lines = 4;
  static BITNET_INLINE __m256i load(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static BITNET_INLINE __m256i low_half(__m256i c) {
    return _mm256_and_si256(c, _mm256_set1_epi8(15));
  }
  static BITNET_INLINE __m256i high_half(__m256i c) { return low_half(_mm256_srli_epi16(c, 4)); }
  static BITNET_INLINE __m256i zero() { return _mm256_setzero_si256(); }
  static BITNET_INLINE __m256i add(__m256i sums, __m256i nibbles, const int8_t* x) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, nibbles, load(x));
#elif defined(__AVX512VNNI__)
    return _mm256_dpbusd_epi32(sums, nibbles, load(x));
#else
    const __m256i pairs = _mm256_maddubs_epi16(nibbles, load(x));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  }
  static BITNET_INLINE int32_t total(__m256i sums) {
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
  }
};

}  // namespace
}  // namespace bitnet
