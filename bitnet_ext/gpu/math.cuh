// exp and tanh with the bits of the CPU's (csrc/rowwise/math.h): the same operations in the same
// order.
#pragma once
#include "ptx.cuh"

// c[0] + x * (c[1] + x * (c[2] + ...)), each step one fused multiply-add.
INLINE float poly(float, float c) { return c; }
template <class... Rest>
INLINE float poly(float x, float c, Rest... rest) {
  return fma_rn(x, poly(x, rest...), c);
}

// 2^n for n from -126 to 127.
INLINE float power_of_two(int32_t n) { return __int_as_float((n + 127) << 23); }

// e^x = 2^n e^r, n = rint(x / log 2), r = x - n log 2 with log 2 in two parts. Results below the
// normal range round once, above overflow to infinity. exp(NaN) = NaN, exp(-inf) = 0.
INLINE float exp_rn(float x) {
  x = 89.0f < x ? 89.0f : x;
  x = -104.0f > x ? -104.0f : x;
  const int32_t whole = round_to_int(mul_rn(x, 0x1.715476p+0f));
  const float n = to_float(whole);
  const float r = fma_rn(n, -0x1.7f7d1cp-20f, fma_rn(n, -0x1.62e4p-1f, x));
  const float p = poly(r, 0x1p-1f, 0x1.555554p-3f, 0x1.5554e8p-5f, 0x1.11131p-7f, 0x1.6d4cdap-10f,
                       0x1.9df7f2p-13f);
  const float y = add_rn(fma_rn(p, mul_rn(r, r), r), 1.0f);
  const int32_t half = whole >> 1;
  return mul_rn(mul_rn(y, power_of_two(half)), power_of_two(whole - half));
}

// tanh x = x + x z P(z), z = x^2, near 0; else 1 - 2 / (e^(2 |x|) + 1) with the sign of x.
INLINE float tanh_rn(float x) {
  const float t = magnitude(x), z = mul_rn(x, x);
  const float p = poly(z, -0x1.555554p-2f, 0x1.11107ap-3f, -0x1.b9f188p-5f, 0x1.63a55p-6f,
                       -0x1.0c5edp-7f, 0x1.1a2814p-9f);
  const float near = fma_rn(mul_rn(x, z), p, x);
  const float far = sub_rn(1.0f, div_rn(2.0f, add_rn(exp_rn(add_rn(t, t)), 1.0f)));
  const int32_t sign = __float_as_int(x) & int32_t(0x80000000u);
  return t < 0.625f ? near : __int_as_float(__float_as_int(far) | sign);
}
