// What becomes of a product's integers, in the CPU's order of float operations:
//
//   acc = sum_k q c - sum_k q                        out of int32: that is all
//   y = (acc / s) * scale  or, divide,  acc / (scale * s);   y += bias;   y = residual + y
//   gated: y = act(gate) * up, where gate and up are two such y     relu2, or silu = x / (1 + e^-x)
//
// Bounds: |sum_k q c| <= 2 * 128 * k and |acc| <= 128 * k fit int32 for k <= 2^18 (weight.py).
//
// Every kernel brings its sums to shared memory and has the block's threads finish them: types and
// gates are chosen there at run time, next to divisions that cost more.
#pragma once
#include "math.cuh"

enum Gate { kNoGate, kRelu2, kSilu };
enum Output { kInt32, kFloat, kHalf, kBfloat };

// The arguments of a product's kernel that its epilogue reads, in the order in which it has them.
#define EPILOGUE_PARAMETERS                                                     \
  void *out,                            /* [rows][n], or [rows][n / 2] gated */ \
      const int32_t *__restrict__ sums, /* [rows] sum_k q */                    \
      const float *__restrict__ s,      /* [rows] scales of the activations */  \
      const float *__restrict__ scale,  /* [outputs], in the layout's order */  \
      const float *__restrict__ bias,   /* [outputs] likewise, or null */       \
      const float *residual,            /* float, as out, or null */            \
      int64_t out_stride, int32_t output, int32_t gate, int32_t divide, int32_t rows, int32_t n
#define EPILOGUE_ARGUMENTS \
  {out, sums, s, scale, bias, residual, out_stride, output, gate, divide, rows, n}

struct Epilogue {
  void* out;
  const int32_t* sums;
  const float *s, *scale, *bias, *residual;
  int64_t out_stride;  // elements between rows
  int32_t output, gate, divide, rows, n;

  // y of output o and token m, before gate and residual.
  INLINE float linear(int32_t acc, int64_t m, int32_t o) const {
    const float a = to_float(acc - sums[m]);
    const float y = divide ? div_rn(a, mul_rn(scale[o], s[m])) : mul_rn(div_rn(a, s[m]), scale[o]);
    return bias ? add_rn(y, bias[o]) : y;
  }

  INLINE void put(int64_t m, int32_t column, float y) const {
    const int64_t at = m * out_stride + column;
    if (residual) y = add_rn(residual[at], y);
    if (output == kFloat)
      static_cast<float*>(out)[at] = y;
    else if (output == kHalf)
      static_cast<half_t*>(out)[at] = from_float<half_t>(y);
    else
      static_cast<bfloat_t*>(out)[at] = from_float<bfloat_t>(y);
  }

  INLINE float activation(float x) const {
    if (gate == kSilu) return div_rn(x, add_rn(1.0f, exp_rn(-x)));
    const float t = 0.0f > x ? 0.0f : x;  // NaN stays
    return mul_rn(t, t);
  }

  // The sums of token m and outputs o and o + 8, o in the first half of a tile.
  INLINE void finish(int32_t low, int32_t high, int64_t m, int32_t o) const {
    if (gate != kNoGate) {
      const int32_t column = o / 16 * 8 + o % 8;
      if (column < n / 2)
        put(m, column, mul_rn(activation(linear(low, m, o)), linear(high, m, o + 8)));
      return;
    }
    for (int h = 0; h < 2; ++h, o += 8, low = high) {
      if (o >= n) continue;
      if (output == kInt32)
        static_cast<int32_t*>(out)[m * out_stride + o] = low - sums[m];
      else
        put(m, o, linear(low, m, o));
    }
  }
};

// Sums of kOutputs outputs are laid kOutputs + 4 apart: a fragment's lanes write to all banks.
template <int kOutputs>
constexpr int kSumStride = kOutputs + 4;

// kThreads threads finish kTokens tokens from m on and kOutputs outputs from o on.
template <int kTokens, int kOutputs, int kThreads>
INLINE void finish_tile(const Epilogue& epilogue,
                        const int32_t* sum,  // [kTokens][kSumStride<kOutputs>], shared
                        int64_t m, int32_t o) {
  constexpr int kPairs = kOutputs / 2;
  for (int i = threadIdx.x; i < kTokens * kPairs; i += kThreads) {
    const int token = i / kPairs, output = i % kPairs / 8 * 16 + i % 8;
    if (m + token >= epilogue.rows) break;
    const int32_t* at = sum + token * kSumStride<kOutputs> + output;
    epilogue.finish(at[0], at[8], m + token, o + output);
  }
}
