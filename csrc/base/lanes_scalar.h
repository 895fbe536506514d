// Sixteen float lanes in plain C++: the definition that lanes_avx2.h and lanes_avx512.h repeat bit
// for bit (tests/test_rowwise*.py). One of the three is included by each kernel file, so every name
// here is in the file's anonymous namespace.
//
//   min, max   a < b ? a : b and a > b ? a : b, as x86: b when either is NaN or both are zeros
//   fma        a * b + c with one rounding
//   to_int     nearest, ties to even; NaN and values outside int32 give INT32_MIN
//   store_i8   nearest, ties to even, saturated to [-128, 127]; NaN gives 0
//   store_f16  nearest, ties to even; NaN keeps its sign and the top of its payload, quiet
//   reduce_*   one tree: x[i] op x[i + 8], then + 4, + 2, + 1
//   *_partial  the first n lanes (0 <= n <= 16); loads fill the rest with zeros
// The bits of a NaN that arithmetic makes are not promised.
#pragma once
#include "base/types.h"

namespace bitnet {
namespace {

constexpr int kLanes = 16;
constexpr int kLaneRegisters = 8;  // F16 values that fit the register file

struct F16 {
  float v[16];
};
struct I16 {
  int32_t v[16];
};
struct M16 {
  int32_t v[16];  // 0 or -1
};

#define BITNET_EACH for (int i = 0; i < 16; ++i)

BITNET_INLINE int32_t float_bits(float x) {
  int32_t b;
  __builtin_memcpy(&b, &x, 4);
  return b;
}
BITNET_INLINE float bits_float(int32_t b) {
  float x;
  __builtin_memcpy(&x, &b, 4);
  return x;
}

// --- load and store ---------------------------------------------------------------------------
BITNET_INLINE F16 set1(float x) {
  F16 r;
  BITNET_EACH r.v[i] = x;
  return r;
}
BITNET_INLINE F16 zero() { return set1(0.0f); }
BITNET_INLINE F16 load(const float* p) {
  F16 r;
  __builtin_memcpy(r.v, p, 64);
  return r;
}
BITNET_INLINE F16 load_partial(const float* p, int n) {
  F16 r = zero();
  for (int i = 0; i < n; ++i) r.v[i] = p[i];
  return r;
}
BITNET_INLINE void store(float* p, F16 a) { __builtin_memcpy(p, a.v, 64); }
BITNET_INLINE void store_partial(float* p, F16 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}

BITNET_INLINE float f16_to_float(uint16_t h) {
  const int32_t sign = int32_t(h & 0x8000u) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00)  // infinity, or NaN made quiet
    return bits_float(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13) |
                      (magnitude > 0x7c00 ? 0x400000 : 0));
  const float scaled = bits_float(magnitude << 13) * 0x1p112f;  // exact, subnormals included
  return bits_float(float_bits(scaled) | sign);
}
BITNET_INLINE uint16_t float_to_f16(float x) {
  const uint32_t b = uint32_t(float_bits(x)), sign = (b >> 16) & 0x8000u, m = b & 0x7fffffffu;
  if (m > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((m >> 13) & 0x3ffu));
  if (m >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or above
  if (m < 0x38800000u)                                    // subnormal: adding 0.5 rounds at 2^-24
    return uint16_t(sign | uint32_t(float_bits(bits_float(int32_t(m)) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((m - 0x38000000u + 0xfffu + ((m >> 13) & 1u)) >> 13));
}

BITNET_INLINE F16 load_f16(const uint16_t* p) {
  F16 r;
  BITNET_EACH r.v[i] = f16_to_float(p[i]);
  return r;
}
BITNET_INLINE F16 load_f16_partial(const uint16_t* p, int n) {
  F16 r = zero();
  for (int i = 0; i < n; ++i) r.v[i] = f16_to_float(p[i]);
  return r;
}
BITNET_INLINE F16 load_bf16(const uint16_t* p) {
  F16 r;
  BITNET_EACH r.v[i] = bits_float(int32_t(uint32_t(p[i]) << 16));
  return r;
}
BITNET_INLINE F16 load_bf16_partial(const uint16_t* p, int n) {
  F16 r = zero();
  for (int i = 0; i < n; ++i) r.v[i] = bits_float(int32_t(uint32_t(p[i]) << 16));
  return r;
}
BITNET_INLINE F16 load_i8(const int8_t* p) {
  F16 r;
  BITNET_EACH r.v[i] = float(p[i]);
  return r;
}
BITNET_INLINE F16 load_i8_partial(const int8_t* p, int n) {
  F16 r = zero();
  for (int i = 0; i < n; ++i) r.v[i] = float(p[i]);
  return r;
}
BITNET_INLINE void store_f16_partial(uint16_t* p, F16 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = float_to_f16(a.v[i]);
}
BITNET_INLINE void store_f16(uint16_t* p, F16 a) { store_f16_partial(p, a, 16); }

// a, out of memory: not read there again for each use.
BITNET_INLINE F16 in_register(F16 a) { return a; }

// --- arithmetic -------------------------------------------------------------------------------
BITNET_INLINE F16 add(F16 a, F16 b) {
  BITNET_EACH a.v[i] += b.v[i];
  return a;
}
BITNET_INLINE F16 sub(F16 a, F16 b) {
  BITNET_EACH a.v[i] -= b.v[i];
  return a;
}
BITNET_INLINE F16 mul(F16 a, F16 b) {
  BITNET_EACH a.v[i] *= b.v[i];
  return a;
}
BITNET_INLINE F16 div(F16 a, F16 b) {
  BITNET_EACH a.v[i] /= b.v[i];
  return a;
}
BITNET_INLINE F16 fma(F16 a, F16 b, F16 c) {
  BITNET_EACH a.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return a;
}
// sum += *x * y
BITNET_INLINE void add_product(F16& sum, const float* x, F16 y) { sum = fma(set1(*x), y, sum); }
BITNET_INLINE F16 min(F16 a, F16 b) {
  BITNET_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
BITNET_INLINE F16 max(F16 a, F16 b) {
  BITNET_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
BITNET_INLINE F16 sqrt(F16 a) {
  BITNET_EACH a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
BITNET_INLINE F16 abs(F16 a) {
  BITNET_EACH a.v[i] = bits_float(float_bits(a.v[i]) & 0x7fffffff);
  return a;
}
BITNET_INLINE F16 neg(F16 a) {
  BITNET_EACH a.v[i] = bits_float(float_bits(a.v[i]) ^ INT32_MIN);
  return a;
}
BITNET_INLINE F16 copysign(F16 magnitude, F16 sign) {
  BITNET_EACH magnitude.v[i] =
      bits_float((float_bits(magnitude.v[i]) & 0x7fffffff) | (float_bits(sign.v[i]) & INT32_MIN));
  return magnitude;
}
BITNET_INLINE F16 rint(F16 a) {
  const F16 t = abs(a);  // adding 2^23 drops the fraction, ties to even
  F16 r;
  BITNET_EACH r.v[i] = (t.v[i] + 0x1p23f) - 0x1p23f;
  r = copysign(r, a);
  BITNET_EACH r.v[i] = t.v[i] < 0x1p23f ? r.v[i] : a.v[i];
  return r;
}

// --- masks ------------------------------------------------------------------------------------
BITNET_INLINE M16 lt(F16 a, F16 b) {
  M16 r;
  BITNET_EACH r.v[i] = -int32_t(a.v[i] < b.v[i]);
  return r;
}
BITNET_INLINE M16 le(F16 a, F16 b) {
  M16 r;
  BITNET_EACH r.v[i] = -int32_t(a.v[i] <= b.v[i]);
  return r;
}
BITNET_INLINE M16 eq(F16 a, F16 b) {
  M16 r;
  BITNET_EACH r.v[i] = -int32_t(a.v[i] == b.v[i]);
  return r;
}
BITNET_INLINE M16 is_nan(F16 a) {
  M16 r;
  BITNET_EACH r.v[i] = -int32_t(a.v[i] != a.v[i]);
  return r;
}
BITNET_INLINE M16 mask_first(int n) {
  M16 r;
  BITNET_EACH r.v[i] = -int32_t(i < n);
  return r;
}
BITNET_INLINE M16 mask_of(uint32_t bits) {
  M16 r;
  BITNET_EACH r.v[i] = -int32_t((bits >> i) & 1u);
  return r;
}
BITNET_INLINE uint32_t mask_bits(M16 m) {
  uint32_t bits = 0;
  BITNET_EACH bits |= (uint32_t(m.v[i]) & 1u) << i;
  return bits;
}
BITNET_INLINE M16 mask_and(M16 a, M16 b) {
  BITNET_EACH a.v[i] &= b.v[i];
  return a;
}
BITNET_INLINE M16 mask_or(M16 a, M16 b) {
  BITNET_EACH a.v[i] |= b.v[i];
  return a;
}
BITNET_INLINE F16 select(M16 m, F16 a, F16 b) {  // a where m, else b
  BITNET_EACH a.v[i] = bits_float((float_bits(a.v[i]) & m.v[i]) | (float_bits(b.v[i]) & ~m.v[i]));
  return a;
}

// --- integers ---------------------------------------------------------------------------------
BITNET_INLINE I16 set1_int(int32_t x) {
  I16 r;
  BITNET_EACH r.v[i] = x;
  return r;
}
BITNET_INLINE I16 bits(F16 a) {
  I16 r;
  __builtin_memcpy(r.v, a.v, 64);
  return r;
}
BITNET_INLINE F16 from_bits(I16 a) {
  F16 r;
  __builtin_memcpy(r.v, a.v, 64);
  return r;
}
BITNET_INLINE I16 add(I16 a, I16 b) {  // wraps
  BITNET_EACH a.v[i] = int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i]));
  return a;
}
BITNET_INLINE I16 sub(I16 a, I16 b) {
  BITNET_EACH a.v[i] = int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i]));
  return a;
}
BITNET_INLINE I16 bit_and(I16 a, I16 b) {
  BITNET_EACH a.v[i] &= b.v[i];
  return a;
}
BITNET_INLINE I16 bit_or(I16 a, I16 b) {
  BITNET_EACH a.v[i] |= b.v[i];
  return a;
}
BITNET_INLINE I16 bit_xor(I16 a, I16 b) {
  BITNET_EACH a.v[i] ^= b.v[i];
  return a;
}
BITNET_INLINE I16 max(I16 a, I16 b) {
  BITNET_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
template <int N>
BITNET_INLINE I16 shift_left(I16 a) {
  BITNET_EACH a.v[i] = int32_t(uint32_t(a.v[i]) << N);
  return a;
}
template <int N>
BITNET_INLINE I16 shift_right(I16 a) {  // arithmetic
  BITNET_EACH a.v[i] >>= N;
  return a;
}
// The low and high 32 bits of unsigned products.
BITNET_INLINE I16 product_low(I16 a, I16 b) {
  BITNET_EACH a.v[i] = int32_t(uint32_t(a.v[i]) * uint32_t(b.v[i]));
  return a;
}
BITNET_INLINE I16 product_high(I16 a, I16 b) {
  BITNET_EACH a.v[i] = int32_t(uint64_t(uint32_t(a.v[i])) * uint32_t(b.v[i]) >> 32);
  return a;
}
// Each lane two int16: plus the products of the low ones and of the high ones.
BITNET_INLINE I16 add_pair_products(I16 sum, I16 a, I16 b) {
  BITNET_EACH sum.v[i] += int16_t(a.v[i]) * int16_t(b.v[i]) + (a.v[i] >> 16) * (b.v[i] >> 16);
  return sum;
}
// The same of four bytes, those of a unsigned, where kByteProducts; else of two int16 as well.
constexpr bool kByteProducts = false;
BITNET_INLINE I16 add_word_products(I16 sum, I16 a, I16 b) { return add_pair_products(sum, a, b); }
BITNET_INLINE F16 to_float(I16 a) {
  F16 r;
  BITNET_EACH r.v[i] = float(a.v[i]);
  return r;
}
BITNET_INLINE I16 to_int(F16 a) {
  const F16 n = rint(a);
  I16 r;
  BITNET_EACH r.v[i] = n.v[i] >= -0x1p31f && n.v[i] < 0x1p31f ? int32_t(n.v[i]) : INT32_MIN;
  return r;
}
// a * 2^n for whole n in [-252, 254] and a near 1: in two halves, so that a result below the normal
// range rounds once. NaN where either is.
BITNET_INLINE F16 power_of_two(I16 n) { return from_bits(shift_left<23>(add(n, set1_int(127)))); }
BITNET_INLINE F16 scale_binary(F16 a, F16 n) {
  const I16 whole = to_int(n), half = shift_right<1>(whole);
  return mul(mul(a, power_of_two(half)), power_of_two(sub(whole, half)));
}
BITNET_INLINE I16 load_int(const int32_t* p) {
  I16 r;
  __builtin_memcpy(r.v, p, 64);
  return r;
}
BITNET_INLINE void store_int(int32_t* p, I16 a) { __builtin_memcpy(p, a.v, 64); }
BITNET_INLINE void store_i8_partial(int8_t* p, F16 a, int n) {
  const F16 r = rint(a);
  for (int i = 0; i < n; ++i) {
    const float low = r.v[i] > -128.0f ? r.v[i] : -128.0f;
    p[i] = r.v[i] != r.v[i] ? int8_t(0) : int8_t(low < 127.0f ? low : 127.0f);
  }
}
BITNET_INLINE void store_i8(int8_t* p, F16 a) { store_i8_partial(p, a, 16); }

// --- reductions -------------------------------------------------------------------------------
BITNET_INLINE float reduce_add(F16 a) {
  for (int i = 0; i < 8; ++i) a.v[i] += a.v[i + 8];
  for (int i = 0; i < 4; ++i) a.v[i] += a.v[i + 4];
  for (int i = 0; i < 2; ++i) a.v[i] += a.v[i + 2];
  return a.v[0] + a.v[1];
}
BITNET_INLINE float reduce_max(F16 a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  return a.v[0];
}
BITNET_INLINE int32_t reduce_max(I16 a) {
  int32_t m = a.v[0];
  BITNET_EACH m = a.v[i] > m ? a.v[i] : m;
  return m;
}

// --- moves ------------------------------------------------------------------------------------
// Lane i of x[j] and lane j of x[i] change places; bits move untouched.
BITNET_INLINE void transpose(F16* x) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) {
      const int32_t kept = float_bits(x[i].v[j]);
      __builtin_memcpy(&x[i].v[j], &x[j].v[i], 4);
      __builtin_memcpy(&x[j].v[i], &kept, 4);
    }
}
// Columns of 16 rows: lane j of y[i] is p[j * stride + i], i < 4.
BITNET_INLINE void load_columns(const float* p, int64_t stride, F16* y) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 16; ++j) __builtin_memcpy(&y[i].v[j], p + j * stride + i, 4);
}

#undef BITNET_EACH

}  // namespace
}  // namespace bitnet
