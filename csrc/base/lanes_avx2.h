// Sixteen float lanes in two AVX2 registers (FMA and F16C too); semantics in lanes_scalar.h.
#pragma once
#include <immintrin.h>

#include "base/types.h"

namespace bitnet {
namespace {

constexpr int kLanes = 16;
constexpr int kLaneRegisters = 8;  // F16 values that fit the register file

struct F16 {
  __m256 lo, hi;
};
struct I16 {
  __m256i lo, hi;
};
struct M16 {
  __m256 lo, hi;  // all bits of a lane set or clear
};

// The masks of the first n of 8 lanes start at kPrefix + 8 - n.
alignas(64) constexpr int32_t kPrefix[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                             0,  0,  0,  0,  0,  0,  0,  0};

struct Prefix {
  __m256i lo, hi;
};
BITNET_INLINE Prefix first_lanes(int n) {
  const int low = n < 8 ? n : 8, high = n - low;
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPrefix + 8 - low)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPrefix + 8 - high))};
}

// --- load and store ---------------------------------------------------------------------------
BITNET_INLINE F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
BITNET_INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
BITNET_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
BITNET_INLINE F16 load_partial(const float* p, int n) {
  const Prefix m = first_lanes(n);
  return {_mm256_maskload_ps(p, m.lo), _mm256_maskload_ps(p + 8, m.hi)};
}
BITNET_INLINE void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
BITNET_INLINE void store_partial(float* p, F16 a, int n) {
  const Prefix m = first_lanes(n);
  _mm256_maskstore_ps(p, m.lo, a.lo);
  _mm256_maskstore_ps(p + 8, m.hi, a.hi);
}
BITNET_INLINE __m128i load_half(const void* p, int index) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p) + index);
}
BITNET_INLINE F16 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_half(p, 0)), _mm256_cvtph_ps(load_half(p, 1))};
}
BITNET_INLINE F16 load_f16_partial(const uint16_t* p, int n) {
  uint16_t whole[16] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load_f16(whole);
}
BITNET_INLINE __m256 widen_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
BITNET_INLINE F16 load_bf16(const uint16_t* p) {
  return {widen_bf16(load_half(p, 0)), widen_bf16(load_half(p, 1))};
}
BITNET_INLINE F16 load_bf16_partial(const uint16_t* p, int n) {
  uint16_t whole[16] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load_bf16(whole);
}
BITNET_INLINE F16 load_i8(const int8_t* p) {
  const __m128i b = load_half(p, 0);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
}
BITNET_INLINE F16 load_i8_partial(const int8_t* p, int n) {
  int8_t whole[16] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load_i8(whole);
}
BITNET_INLINE void store_f16(uint16_t* p, F16 a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, nearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, _mm256_cvtps_ph(a.hi, nearest));
}
BITNET_INLINE void store_f16_partial(uint16_t* p, F16 a, int n) {
  uint16_t whole[16];
  store_f16(whole, a);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

BITNET_INLINE F16 in_register(F16 a) { return a; }

// --- arithmetic -------------------------------------------------------------------------------
BITNET_INLINE F16 add(F16 a, F16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
BITNET_INLINE F16 sub(F16 a, F16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
BITNET_INLINE F16 mul(F16 a, F16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
BITNET_INLINE F16 div(F16 a, F16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
BITNET_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// sum += *x * y
BITNET_INLINE void add_product(F16& sum, const float* x, F16 y) { sum = fma(set1(*x), y, sum); }
BITNET_INLINE F16 min(F16 a, F16 b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
BITNET_INLINE F16 max(F16 a, F16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
BITNET_INLINE F16 sqrt(F16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
BITNET_INLINE F16 abs(F16 a) {
  const __m256 top = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(top, a.lo), _mm256_andnot_ps(top, a.hi)};
}
BITNET_INLINE F16 neg(F16 a) {
  const __m256 top = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(top, a.lo), _mm256_xor_ps(top, a.hi)};
}
BITNET_INLINE F16 copysign(F16 magnitude, F16 sign) {
  const __m256 top = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(top, magnitude.lo), _mm256_and_ps(top, sign.lo)),
          _mm256_or_ps(_mm256_andnot_ps(top, magnitude.hi), _mm256_and_ps(top, sign.hi))};
}
BITNET_INLINE F16 rint(F16 a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, nearest), _mm256_round_ps(a.hi, nearest)};
}

// --- masks ------------------------------------------------------------------------------------
BITNET_INLINE M16 lt(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
BITNET_INLINE M16 le(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LE_OQ)};
}
BITNET_INLINE M16 eq(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
BITNET_INLINE M16 is_nan(F16 a) {
  return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
BITNET_INLINE M16 mask_first(int n) {
  const Prefix m = first_lanes(n);
  return {_mm256_castsi256_ps(m.lo), _mm256_castsi256_ps(m.hi)};
}
BITNET_INLINE M16 mask_of(uint32_t bits) {
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_slli_epi32(low, 8), all = _mm256_set1_epi32(int32_t(bits));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, high), high))};
}
BITNET_INLINE uint32_t mask_bits(M16 m) {
  return uint32_t(_mm256_movemask_ps(m.lo)) | uint32_t(_mm256_movemask_ps(m.hi)) << 8;
}
BITNET_INLINE M16 mask_and(M16 a, M16 b) {
  return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)};
}
BITNET_INLINE M16 mask_or(M16 a, M16 b) {
  return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)};
}
BITNET_INLINE F16 select(M16 m, F16 a, F16 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}

// --- integers ---------------------------------------------------------------------------------
BITNET_INLINE I16 set1_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
BITNET_INLINE I16 bits(F16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
BITNET_INLINE F16 from_bits(I16 a) {
  return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
BITNET_INLINE I16 add(I16 a, I16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
BITNET_INLINE I16 sub(I16 a, I16 b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
BITNET_INLINE I16 bit_and(I16 a, I16 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
BITNET_INLINE I16 bit_or(I16 a, I16 b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
BITNET_INLINE I16 bit_xor(I16 a, I16 b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
BITNET_INLINE I16 max(I16 a, I16 b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
template <int N>
BITNET_INLINE I16 shift_left(I16 a) {
  return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)};
}
template <int N>
BITNET_INLINE I16 shift_right(I16 a) {  // arithmetic
  return {_mm256_srai_epi32(a.lo, N), _mm256_srai_epi32(a.hi, N)};
}
BITNET_INLINE I16 product_low(I16 a, I16 b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
BITNET_INLINE __m256i product_high(__m256i a, __m256i b) {
  const __m256i even = _mm256_mul_epu32(a, b);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
BITNET_INLINE I16 product_high(I16 a, I16 b) {
  return {product_high(a.lo, b.lo), product_high(a.hi, b.hi)};
}
#if defined(__AVXVNNI__)
constexpr bool kByteProducts = true;
BITNET_INLINE I16 add_pair_products(I16 sum, I16 a, I16 b) {
  return {_mm256_dpwssd_avx_epi32(sum.lo, a.lo, b.lo), _mm256_dpwssd_avx_epi32(sum.hi, a.hi, b.hi)};
}
BITNET_INLINE I16 add_word_products(I16 sum, I16 a, I16 b) {
  return {_mm256_dpbusd_avx_epi32(sum.lo, a.lo, b.lo), _mm256_dpbusd_avx_epi32(sum.hi, a.hi, b.hi)};
}
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
constexpr bool kByteProducts = true;
BITNET_INLINE I16 add_pair_products(I16 sum, I16 a, I16 b) {
  return {_mm256_dpwssd_epi32(sum.lo, a.lo, b.lo), _mm256_dpwssd_epi32(sum.hi, a.hi, b.hi)};
}
BITNET_INLINE I16 add_word_products(I16 sum, I16 a, I16 b) {
  return {_mm256_dpbusd_epi32(sum.lo, a.lo, b.lo), _mm256_dpbusd_epi32(sum.hi, a.hi, b.hi)};
}
#else
constexpr bool kByteProducts = false;
BITNET_INLINE I16 add_pair_products(I16 sum, I16 a, I16 b) {
  return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(a.lo, b.lo)),
          _mm256_add_epi32(sum.hi, _mm256_madd_epi16(a.hi, b.hi))};
}
BITNET_INLINE I16 add_word_products(I16 sum, I16 a, I16 b) { return add_pair_products(sum, a, b); }
#endif
BITNET_INLINE F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
BITNET_INLINE I16 to_int(F16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
BITNET_INLINE F16 power_of_two(I16 n) { return from_bits(shift_left<23>(add(n, set1_int(127)))); }
BITNET_INLINE F16 scale_binary(F16 a, F16 n) {
  const I16 whole = to_int(n), half = shift_right<1>(whole);
  return mul(mul(a, power_of_two(half)), power_of_two(sub(whole, half)));
}
BITNET_INLINE I16 load_int(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1)};
}
BITNET_INLINE void store_int(int32_t* p, I16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, a.hi);
}
BITNET_INLINE __m256i clamped_i8(__m256 a) {
  // Clamped before the conversion, which turns values outside int32 into INT32_MIN; NaN masked to
  // 0.
  const __m256 low = _mm256_max_ps(a, _mm256_set1_ps(-128.0f));
  const __m256 both = _mm256_min_ps(low, _mm256_set1_ps(127.0f));
  return _mm256_cvtps_epi32(_mm256_and_ps(both, _mm256_cmp_ps(a, a, _CMP_ORD_Q)));
}
BITNET_INLINE void store_i8(int8_t* p, F16 a) {
  const __m256i words = _mm256_packs_epi32(clamped_i8(a.lo), clamped_i8(a.hi));
  const __m256i in_order = _mm256_permute4x64_epi64(words, 0xd8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packs_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1)));
}
BITNET_INLINE void store_i8_partial(int8_t* p, F16 a, int n) {
  int8_t whole[16];
  store_i8(whole, a);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

// --- reductions -------------------------------------------------------------------------------
BITNET_INLINE float reduce_add(F16 a) {
  const __m256 e = _mm256_add_ps(a.lo, a.hi);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
BITNET_INLINE float reduce_max(F16 a) {
  const __m256 e = _mm256_max_ps(a.lo, a.hi);
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}
BITNET_INLINE int32_t reduce_max(I16 a) {
  const __m256i e = _mm256_max_epi32(a.lo, a.hi);
  const __m128i q = _mm_max_epi32(_mm256_castsi256_si128(e), _mm256_extracti128_si256(e, 1));
  const __m128i d = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(d, _mm_shuffle_epi32(d, 0xb1)));
}

// --- moves ------------------------------------------------------------------------------------
BITNET_INLINE void transpose_eight(__m256* x) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {  // within the halves: 2 x 2, then 4 x 4
    pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
    }
  for (int j = 0; j < 4; ++j) {  // then the halves themselves
    x[j] = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x20);
    x[4 + j] = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x31);
  }
}
BITNET_INLINE void transpose(F16* x) {
  __m256 part[4][8];  // upper left, upper right, lower left, lower right
  for (int i = 0; i < 8; ++i) {
    part[0][i] = x[i].lo, part[1][i] = x[i].hi;
    part[2][i] = x[8 + i].lo, part[3][i] = x[8 + i].hi;
  }
  for (int i = 0; i < 4; ++i) transpose_eight(part[i]);
  for (int i = 0; i < 8; ++i) {
    x[i] = {part[0][i], part[2][i]};
    x[8 + i] = {part[1][i], part[3][i]};
  }
}
BITNET_INLINE __m256 load_quarters(const float* low, const float* high) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}
BITNET_INLINE void load_columns(const float* p, int64_t stride, __m256* y) {
  __m256 rows[4];  // a row to a half: i, i + 4
  for (int i = 0; i < 4; ++i, p += stride) {
    __asm__("" : "+r"(p));  // else a loop holds the addresses of all rows, on the stack
    rows[i] = load_quarters(p, p + 4 * stride);
  }
  const __m256 a = _mm256_unpacklo_ps(rows[0], rows[1]), b = _mm256_unpacklo_ps(rows[2], rows[3]);
  const __m256 c = _mm256_unpackhi_ps(rows[0], rows[1]), d = _mm256_unpackhi_ps(rows[2], rows[3]);
  y[0] = _mm256_shuffle_ps(a, b, 0x44), y[1] = _mm256_shuffle_ps(a, b, 0xee);
  y[2] = _mm256_shuffle_ps(c, d, 0x44), y[3] = _mm256_shuffle_ps(c, d, 0xee);
}
BITNET_INLINE void load_columns(const float* p, int64_t stride, F16* y) {
  __m256 low[4], high[4];
  load_columns(p, stride, low), load_columns(p + 8 * stride, stride, high);
  for (int i = 0; i < 4; ++i) y[i] = {low[i], high[i]};
}

}  // namespace
}  // namespace bitnet
