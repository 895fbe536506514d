// 32 bytes of codes or sums, for kernels written over vectors of either width.
#pragma once
#include <immintrin.h>

#include "base/types.h"

namespace bitnet {
namespace {

struct Bytes256 {
  using type = __m256i;
  static constexpr int bytes = 32, sums = 12;
  static BITNET_INLINE type zero() { return _mm256_setzero_si256(); }
  static BITNET_INLINE type set1(char byte) { return _mm256_set1_epi8(byte); }
  static BITNET_INLINE type set1_int(int32_t x) { return _mm256_set1_epi32(x); }
  static BITNET_INLINE type load(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  // 16 bytes, repeated.
  static BITNET_INLINE type load_lanes(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  // int16 -> int32
  static BITNET_INLINE type widen16(const void* p) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static BITNET_INLINE void store(void* p, type v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
  static BITNET_INLINE type bit_and(type a, type b) { return _mm256_and_si256(a, b); }
  static BITNET_INLINE type bit_or(type a, type b) { return _mm256_or_si256(a, b); }
  template <int N>
  static BITNET_INLINE type shift(type v) {
    return _mm256_srli_epi16(v, N);
  }
  template <int N>
  static BITNET_INLINE type shift_left(type v) {
    return _mm256_slli_epi16(v, N);
  }
  static BITNET_INLINE type add8(type a, type b) { return _mm256_add_epi8(a, b); }
  // r - 128, as AVX2 compares signed bytes: three times it is 3 r - 128 mod 256.
  static BITNET_INLINE type fractions(type r) { return _mm256_xor_si256(r, set1(-128)); }
  static BITNET_INLINE type digit(type v) {
    const type one = _mm256_cmpgt_epi8(v, set1(85 - 128)),
               two = _mm256_cmpgt_epi8(v, set1(170 - 128));
    return _mm256_sub_epi8(_mm256_sub_epi8(zero(), one), two);
  }
  // byte i of the same 16 bytes of table: table[index[i]], index < 16
  static BITNET_INLINE type shuffle8(type table, type index) {
    return _mm256_shuffle_epi8(table, index);
  }
  static BITNET_INLINE type maddubs(type codes, type q) { return _mm256_maddubs_epi16(codes, q); }
  static BITNET_INLINE type add16(type a, type b) { return _mm256_add_epi16(a, b); }
  static BITNET_INLINE type sub16(type a, type b) { return _mm256_sub_epi16(a, b); }
  static BITNET_INLINE type add_pairs(type v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }
  static BITNET_INLINE type add32(type a, type b) { return _mm256_add_epi32(a, b); }
  // a + the sum of four (u8 code) x (s8 x) in each int32 lane. Without vpdpbusd a pair of products
  // goes through int16, so that codes are to be below 128: 2 * 127 * 128 < 32768.
  static BITNET_INLINE type dot(type a, type codes, type x) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(a, codes, x);
#elif defined(__AVX512VNNI__)
    return _mm256_dpbusd_epi32(a, codes, x);
#else
    return add32(a, add_pairs(maddubs(codes, x)));
#endif
  }
  // The sum of the int32 lanes.
  static BITNET_INLINE int32_t total(type v) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
  }
};

}  // namespace
}  // namespace bitnet
