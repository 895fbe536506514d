// Sixteen float lanes in one AVX-512 register; semantics in lanes_scalar.h.
#pragma once
#include <immintrin.h>

#include "base/types.h"

namespace bitnet {
namespace {

constexpr int kLanes = 16;
constexpr int kLaneRegisters = 32;  // F16 values that fit the register file

struct F16 {
  __m512 v;
};
struct I16 {
  __m512i v;
};
struct M16 {
  __mmask16 v;
};

BITNET_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1u); }

// --- load and store ---------------------------------------------------------------------------
BITNET_INLINE F16 set1(float x) { return {_mm512_set1_ps(x)}; }
BITNET_INLINE F16 zero() { return {_mm512_setzero_ps()}; }
BITNET_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
BITNET_INLINE F16 load_partial(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
BITNET_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
BITNET_INLINE void store_partial(float* p, F16 a, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
}
BITNET_INLINE F16 load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
BITNET_INLINE F16 load_f16_partial(const uint16_t* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
BITNET_INLINE F16 widen_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
BITNET_INLINE F16 load_bf16(const uint16_t* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
BITNET_INLINE F16 load_bf16_partial(const uint16_t* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
BITNET_INLINE F16 load_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
BITNET_INLINE F16 load_i8_partial(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)))};
}
BITNET_INLINE __m256i narrow_f16(F16 a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
BITNET_INLINE void store_f16(uint16_t* p, F16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a));
}
BITNET_INLINE void store_f16_partial(uint16_t* p, F16 a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_f16(a));
}

BITNET_INLINE F16 in_register(F16 a) {
  __asm__("" : "+v"(a.v));
  return a;
}

// --- arithmetic -------------------------------------------------------------------------------
BITNET_INLINE F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
BITNET_INLINE F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
BITNET_INLINE F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
BITNET_INLINE F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
BITNET_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// sum += *x * y. In assembly because GCC 12 gives *x a register, and then has none left for y.
BITNET_INLINE void add_product(F16& sum, const float* x, F16 y) {
  __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(y.v), "m"(*x));
}
BITNET_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
BITNET_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
BITNET_INLINE F16 sqrt(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
BITNET_INLINE F16 abs(F16 a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
BITNET_INLINE F16 neg(F16 a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
BITNET_INLINE F16 copysign(F16 magnitude, F16 sign) {
  const __m512 top = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(top, magnitude.v), _mm512_and_ps(top, sign.v))};
}
BITNET_INLINE F16 rint(F16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// --- masks ------------------------------------------------------------------------------------
BITNET_INLINE M16 lt(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
BITNET_INLINE M16 le(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
BITNET_INLINE M16 eq(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
BITNET_INLINE M16 is_nan(F16 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
BITNET_INLINE M16 mask_first(int n) { return {first_lanes(n)}; }
BITNET_INLINE M16 mask_of(uint32_t bits) { return {__mmask16(bits)}; }
BITNET_INLINE uint32_t mask_bits(M16 m) { return m.v; }
BITNET_INLINE M16 mask_and(M16 a, M16 b) { return {__mmask16(a.v & b.v)}; }
BITNET_INLINE M16 mask_or(M16 a, M16 b) { return {__mmask16(a.v | b.v)}; }
BITNET_INLINE F16 select(M16 m, F16 a, F16 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }

// --- integers ---------------------------------------------------------------------------------
BITNET_INLINE I16 set1_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
BITNET_INLINE I16 bits(F16 a) { return {_mm512_castps_si512(a.v)}; }
BITNET_INLINE F16 from_bits(I16 a) { return {_mm512_castsi512_ps(a.v)}; }
BITNET_INLINE I16 add(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
BITNET_INLINE I16 sub(I16 a, I16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
BITNET_INLINE I16 bit_and(I16 a, I16 b) { return {_mm512_and_si512(a.v, b.v)}; }
BITNET_INLINE I16 bit_or(I16 a, I16 b) { return {_mm512_or_si512(a.v, b.v)}; }
BITNET_INLINE I16 bit_xor(I16 a, I16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
BITNET_INLINE I16 max(I16 a, I16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int N>
BITNET_INLINE I16 shift_left(I16 a) {
  return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
BITNET_INLINE I16 shift_right(I16 a) {  // arithmetic
  return {_mm512_srai_epi32(a.v, N)};
}
BITNET_INLINE I16 product_low(I16 a, I16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
BITNET_INLINE I16 product_high(I16 a, I16 b) {
  const __m512i even = _mm512_mul_epu32(a.v, b.v);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  return {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
}
#ifdef __AVX512VNNI__
constexpr bool kByteProducts = true;
// Assembly, as GCC 12 copies every sum of the intrinsics to another register and back.
BITNET_INLINE I16 add_pair_products(I16 sum, I16 a, I16 b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}
BITNET_INLINE I16 add_word_products(I16 sum, I16 a, I16 b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}
#else
constexpr bool kByteProducts = false;
BITNET_INLINE I16 add_pair_products(I16 sum, I16 a, I16 b) {
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
}
BITNET_INLINE I16 add_word_products(I16 sum, I16 a, I16 b) { return add_pair_products(sum, a, b); }
#endif
BITNET_INLINE F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
BITNET_INLINE I16 to_int(F16 a) { return {_mm512_cvtps_epi32(a.v)}; }
BITNET_INLINE F16 scale_binary(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
BITNET_INLINE I16 load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
BITNET_INLINE void store_int(int32_t* p, I16 a) { _mm512_storeu_si512(p, a.v); }
BITNET_INLINE __m128i narrow_i8(F16 a) {
  // Clamped before the conversion, which turns values outside int32 into INT32_MIN.
  const __mmask16 ordered = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  const __m512 low = _mm512_max_ps(a.v, _mm512_set1_ps(-128.0f));
  const __m512 both = _mm512_min_ps(low, _mm512_set1_ps(127.0f));
  return _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(ordered, both));
}
BITNET_INLINE void store_i8(int8_t* p, F16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_i8(a));
}
BITNET_INLINE void store_i8_partial(int8_t* p, F16 a, int n) {
  _mm_mask_storeu_epi8(p, first_lanes(n), narrow_i8(a));
}

// --- reductions -------------------------------------------------------------------------------
BITNET_INLINE float reduce_add(F16 a) {
  const __m256 e = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
BITNET_INLINE float reduce_max(F16 a) {
  const __m256 e = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}
BITNET_INLINE int32_t reduce_max(I16 a) { return _mm512_reduce_max_epi32(a.v); }

// --- moves ------------------------------------------------------------------------------------
BITNET_INLINE void transpose(F16* x) {
  __m512 pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {  // within the four quarters: 2 x 2, then 4 x 4
    pairs[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      quads[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
    }
  for (int j = 0; j < 4; ++j) {  // then the quarters themselves
    const __m512 a = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
    x[j].v = _mm512_shuffle_f32x4(a, b, 0x88);
    x[4 + j].v = _mm512_shuffle_f32x4(c, d, 0x88);
    x[8 + j].v = _mm512_shuffle_f32x4(a, b, 0xdd);
    x[12 + j].v = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}
BITNET_INLINE void load_columns(const float* p, int64_t stride, F16* y) {
  __m512 rows[4];  // a row to a quarter: i, i + 4, i + 8, i + 12
  for (int i = 0; i < 4; ++i, p += stride) {
    __asm__("" : "+r"(p));  // else a loop holds the addresses of all rows, on the stack
    rows[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
    rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(p + 4 * stride), 1);
    rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(p + 8 * stride), 2);
    rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(p + 12 * stride), 3);
  }
  const __m512 a = _mm512_unpacklo_ps(rows[0], rows[1]), b = _mm512_unpacklo_ps(rows[2], rows[3]);
  const __m512 c = _mm512_unpackhi_ps(rows[0], rows[1]), d = _mm512_unpackhi_ps(rows[2], rows[3]);
  y[0].v = _mm512_shuffle_ps(a, b, 0x44), y[1].v = _mm512_shuffle_ps(a, b, 0xee);
  y[2].v = _mm512_shuffle_ps(c, d, 0x44), y[3].v = _mm512_shuffle_ps(c, d, 0xee);
}

}  // namespace
}  // namespace bitnet
