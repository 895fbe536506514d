// 64 bytes of codes or sums, for kernels written over vectors of either width.
#pragma once
#include <immintrin.h>

#include "base/types.h"

namespace bitnet {
namespace {

struct Bytes512 {
  using type = __m512i;
  static constexpr int bytes = 64, sums = 22;
  static BITNET_INLINE type zero() { return _mm512_setzero_si512(); }
  static BITNET_INLINE type set1(char byte) { return _mm512_set1_epi8(byte); }
  static BITNET_INLINE type set1_int(int32_t x) { return _mm512_set1_epi32(x); }
  static BITNET_INLINE type load(const void* p) { return _mm512_loadu_si512(p); }
  // 16 bytes, repeated.
  static BITNET_INLINE type load_lanes(const void* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  // int16 -> int32
  static BITNET_INLINE type widen16(const void* p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static BITNET_INLINE void store(void* p, type v) { _mm512_storeu_si512(p, v); }
  static BITNET_INLINE type bit_and(type a, type b) { return _mm512_and_si512(a, b); }
  static BITNET_INLINE type bit_or(type a, type b) { return _mm512_or_si512(a, b); }
  template <int N>
  static BITNET_INLINE type shift(type v) {
    return _mm512_srli_epi16(v, N);
  }
  template <int N>
  static BITNET_INLINE type shift_left(type v) {
    return _mm512_slli_epi16(v, N);
  }
  static BITNET_INLINE type add8(type a, type b) { return _mm512_add_epi8(a, b); }
  // Comparisons go to mask registers, so: r - 85 and r - 170, from 0 to 1.
  static BITNET_INLINE type fractions(type r) { return r; }
  static BITNET_INLINE type digit(type r) {
    const type one = _mm512_min_epu8(_mm512_subs_epu8(r, set1(85)), set1(1));
    const type two = _mm512_min_epu8(_mm512_subs_epu8(r, set1(char(170))), set1(1));
    return add8(one, two);
  }
  // byte i of the same 16 bytes of table: table[index[i]], index < 16
  static BITNET_INLINE type shuffle8(type table, type index) {
    return _mm512_shuffle_epi8(table, index);
  }
  static BITNET_INLINE type maddubs(type codes, type q) { return _mm512_maddubs_epi16(codes, q); }
  static BITNET_INLINE type add16(type a, type b) { return _mm512_add_epi16(a, b); }
  static BITNET_INLINE type sub16(type a, type b) { return _mm512_sub_epi16(a, b); }
  static BITNET_INLINE type add_pairs(type v) { return _mm512_madd_epi16(v, _mm512_set1_epi16(1)); }
  static BITNET_INLINE type add32(type a, type b) { return _mm512_add_epi32(a, b); }
  // a + the sum of four (u8 code) x (s8 x) in each int32 lane. Without vpdpbusd a pair of products
  // goes through int16, so that codes are to be below 128: 2 * 127 * 128 < 32768.
  static BITNET_INLINE type dot(type a, type codes, type x) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(a, codes, x);
#else
    return add32(a, add_pairs(maddubs(codes, x)));
#endif
  }
  // The sum of the int32 lanes.
  static BITNET_INLINE int32_t total(type v) { return _mm512_reduce_add_epi32(v); }
};

}  // namespace
}  // namespace bitnet
