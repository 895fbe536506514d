// Activations between two ternary products, where the first one's epilogue does
// not have them:
//
//   y = act(x[:, :width])   or, gated,   act(x[:, :width]) * x[:, width:]
//
//   relu2      max(x, 0)^2
//   silu       x / (1 + e^-x)
//   gelu       x / 2 (1 + erf(x / sqrt(2)))
//   gelu_tanh  x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
//
// The bits are those of csrc/rowwise/rowwise_impl.h.
#include "math.cuh"

constexpr int kThreads = 256;
enum Activation { kRelu2, kSilu, kGelu, kGeluTanh };

// erf x = x + x P(x^2) near 0; else 1 - e^-Q(t), t = min(|x|, 4), with the sign
// of x.
INLINE float erf_rn(float x) {
  const float z = mul_rn(x, x), size = magnitude(x), t = 4.0f < size ? 4.0f : size;
  const float p = poly(z, 0x1.06eba8p-3f, -0x1.81274p-2f, 0x1.ce2d64p-4f, -0x1.b80118p-6f,
                       0x1.5449e2p-8f, -0x1.a60684p-11f, 0x1.4f548p-14f);
  const float q =
      poly(t, -0x1.56004ep-13f, 0x1.21238cp+0f, 0x1.445b5ep-1f, 0x1.ba991ap-4f, -0x1.987608p-6f,
           0x1.0acd28p-8f, -0x1.a598cep-12f, 0x1.fed4aep-17f, 0x1.e9178cp-22f);
  const int32_t far = __float_as_int(sub_rn(1.0f, exp_rn(-q)));
  const int32_t sign = __float_as_int(x) & int32_t(0x80000000u);
  return t < 0.921875f ? fma_rn(x, p, x) : __int_as_float((far & 0x7fffffff) | sign);
}

template <Activation kAct>
INLINE float activation(float x) {
  if (kAct == kRelu2) {
    const float t = 0.0f > x ? 0.0f : x;  // NaN stays
    return mul_rn(t, t);
  }
  if (kAct == kSilu) return div_rn(x, add_rn(1.0f, exp_rn(-x)));
  const float half = mul_rn(x, 0.5f);
  if (kAct == kGelu) return mul_rn(half, add_rn(1.0f, erf_rn(mul_rn(x, 0x1.6a09e6p-1f))));
  const float cubic = fma_rn(mul_rn(0.044715f, mul_rn(x, x)), x, x);
  return mul_rn(half, add_rn(1.0f, tanh_rn(mul_rn(0x1.988454p-1f, cubic))));
}

// grid (rows, steps of a row)
template <Activation kAct>
__global__ void __launch_bounds__(kThreads)
    activate(float* out,      // [rows][width]
             const float* x,  // [rows][width], or [rows][2 width] gated
             int32_t width, int32_t gated) {
  const int64_t m = blockIdx.x;
  const float* row = x + m * width * (gated ? 2 : 1);
  for (int32_t i = blockIdx.y * kThreads + threadIdx.x; i < width; i += gridDim.y * kThreads) {
    const float y = activation<kAct>(row[i]);
    out[m * width + i] = gated ? mul_rn(y, row[width + i]) : y;
  }
}
