// exp, log, tanh, erf over F16: the same operations in the same order on every ISA, so the same
// bits. Coefficients from tools/fit_polynomials.py. Include a lanes header first.
// Largest errors, in float32 units in the last place over a dense sweep
// (tests/test_rowwise_math.py): exp 1, log 1, tanh 2, erf 1.
#pragma once

namespace bitnet {
namespace {

// c[0] + x * (c[1] + x * (c[2] + ...)), each step one fused multiply-add.
BITNET_INLINE F16 poly(F16, float c) { return set1(c); }
template <class... Rest>
BITNET_INLINE F16 poly(F16 x, float c, Rest... rest) {
  return fma(x, poly(x, rest...), set1(c));
}

// e^x = 2^n e^r, n = rint(x / log 2), r = x - n log 2 with log 2 in two parts (n times the first is
// exact). Results below the normal range round once, above overflow to infinity. exp(NaN) = NaN,
// exp(-inf) = 0.
BITNET_INLINE F16 exp_within(F16 x) {  // [-104, 89], beyond which they stay 0 or infinity
  const F16 n = rint(mul(x, set1(0x1.715476p+0f)));
  F16 r = fma(n, set1(-0x1.62e4p-1f), x);
  r = fma(n, set1(-0x1.7f7d1cp-20f), r);
  const F16 p = poly(r, 0x1p-1f, 0x1.555554p-3f, 0x1.5554e8p-5f, 0x1.11131p-7f, 0x1.6d4cdap-10f,
                     0x1.9df7f2p-13f);
  return scale_binary(add(fma(p, mul(r, r), r), set1(1.0f)), n);
}
BITNET_INLINE F16 exp(F16 x) { return exp_within(max(set1(-104.0f), min(set1(89.0f), x))); }

// log x = e log 2 + log m, m in [sqrt(1/2), sqrt(2)), log m = f - f^2 / 2 + f^3 P(f), f = m - 1.
// log 0 = -inf, log of a negative = NaN, log inf = inf.
BITNET_INLINE F16 log(F16 x) {
  const M16 tiny = lt(x, set1(0x1p-126f));
  const F16 scaled = select(tiny, mul(x, set1(0x1p24f)), x);
  // Subtracting the bits of sqrt(1/2) moves the exponent's step to there.
  const I16 offset = sub(bits(scaled), set1_int(0x3f3504f3)), e = shift_right<23>(offset);
  const F16 f = sub(from_bits(sub(bits(scaled), shift_left<23>(e))), set1(1.0f));
  const F16 k = sub(to_float(e), select(tiny, set1(24.0f), zero()));
  const F16 p =
      poly(f, 0x1.555546p-2f, -0x1.fffff8p-3f, 0x1.99a524p-3f, -0x1.555fbep-3f, 0x1.233318p-3f,
           -0x1.fbbf34p-4f, 0x1.e6d1b8p-4f, -0x1.e02114p-4f, 0x1.16a74ap-4f);
  const F16 z = mul(f, f);
  F16 tail = fma(mul(f, z), p, mul(k, set1(0x1.7f7d1cp-20f)));
  tail = fma(z, set1(-0.5f), tail);
  F16 y = fma(k, set1(0x1.62e4p-1f), add(f, tail));
  const F16 inf = set1(__builtin_inff());
  y = select(eq(x, zero()), neg(inf), y);
  y = select(lt(x, zero()), set1(__builtin_nanf("")), y);
  // Infinity and NaN come back as they are.
  return select(lt(x, inf), y, x);
}

// tanh x = x + x z P(z), z = x^2, near 0; else 1 - 2 / (e^(2 |x|) + 1) with the sign of x.
BITNET_INLINE F16 tanh(F16 x) {
  const F16 t = abs(x), z = mul(x, x);
  const F16 p = poly(z, -0x1.555554p-2f, 0x1.11107ap-3f, -0x1.b9f188p-5f, 0x1.63a55p-6f,
                     -0x1.0c5edp-7f, 0x1.1a2814p-9f);
  const F16 near = fma(mul(x, z), p, x);
  const F16 far = sub(set1(1.0f), div(set1(2.0f), add(exp(add(t, t)), set1(1.0f))));
  return select(lt(t, set1(0.625f)), near, copysign(far, x));
}

// erf x = x + x P(x^2) near 0; else 1 - e^-Q(t), t = min(|x|, 4), with the sign of x: from 4 on the
// result is 1.
BITNET_INLINE F16 erf(F16 x) {
  const F16 z = mul(x, x), t = min(set1(4.0f), abs(x));
  const F16 p = poly(z, 0x1.06eba8p-3f, -0x1.81274p-2f, 0x1.ce2d64p-4f, -0x1.b80118p-6f,
                     0x1.5449e2p-8f, -0x1.a60684p-11f, 0x1.4f548p-14f);
  const F16 q =
      poly(t, -0x1.56004ep-13f, 0x1.21238cp+0f, 0x1.445b5ep-1f, 0x1.ba991ap-4f, -0x1.987608p-6f,
           0x1.0acd28p-8f, -0x1.a598cep-12f, 0x1.fed4aep-17f, 0x1.e9178cp-22f);
  const F16 far = copysign(sub(set1(1.0f), exp(neg(q))), x);
  return select(lt(t, set1(0.921875f)), fma(x, p, x), far);
}

}  // namespace
}  // namespace bitnet
