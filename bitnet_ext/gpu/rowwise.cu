// Norms of rows and rotary position embedding, with the bits of csrc/rowwise/norms.h and rotate.h.
//
//   rms    y = (x * r) * w,                r = 1 / sqrt(mean(x^2) + eps)
//   layer  y = ((x - mean) * r) * w + b,   r = 1 / sqrt(mean((x - mean)^2) + eps)
//
//   rotary  y[a] = x[a] cos[i] - x[b] sin[i],  y[b] = x[b] cos[i] + x[a] sin[i]
//           (a, b) = (i, i + half), or (2 i, 2 i + 1) interleaved; products rounded before the sum
//
// Every NaN written is the one quiet NaN.
#include "norms.cuh"

constexpr int kThreads = 256;

// grid (rows), block kThreads; shared memory: float [width] where the row is `staged` in it
template <int kKind>
__global__ void __launch_bounds__(kThreads)
    norm_rows(const float* x,  // [rows][width], rows `stride` elements apart
              int64_t stride, int32_t width, const float* weight, const float* bias,  // or null
              float eps, float* y,          // [rows][width]
              float* mean, float* inv_std,  // [rows], or null
              int32_t staged) {
  DYNAMIC_SHARED(shared);
  __shared__ float2 moment;
  const int64_t row = blockIdx.x;
  const float* from = x + row * stride;
  float* to = y + row * width;
  if (staged) {
    float* held = reinterpret_cast<float*>(shared);
    fetch_floats<kThreads>(held, from, width);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    from = held;
  }
  if (threadIdx.x < kLanes) {
    const float2 m = moments<kKind>(from, width, eps);
    if (threadIdx.x == 0) {
      moment = m;
      if (mean) mean[row] = one_nan(m.x);
      if (inv_std) inv_std[row] = one_nan(m.y);
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < width; i += kThreads) {
    float v = kKind == kLayer ? sub_rn(from[i], moment.x) : from[i];
    v = mul_rn(v, moment.y);
    if (weight) v = mul_rn(v, weight[i]);
    if (bias) v = add_rn(v, bias[i]);
    to[i] = one_nan(v);
  }
}

// Elements from 2 half on are copied; a token whose id no row has is NaN. y may be x. grid (batch x
// tokens, heads), block kThreads; a few blocks a processor, so that the compiler takes the
// registers it needs
__global__ void __launch_bounds__(kThreads, 2)
    rotate_heads(const float* x,  // [batch][heads][tokens][size] at these strides, in elements
                 int64_t x_batch, int64_t x_head, int64_t x_token, float* y, int64_t y_batch,
                 int64_t y_head, int64_t y_token, const float* cos,
                 const float* sin,    // [positions][half]
                 const int64_t* ids,  // [batch x tokens], or null:
                 int64_t first_id,    // of token 0 of sequence 0,
                 int64_t batch_ids,   // from there to the next sequence's
                 int64_t positions, int32_t tokens, int32_t size, int32_t half, int32_t interleaved,
                 int32_t backward) {  // by the opposite angle
  const int32_t row = blockIdx.x, batch = row / tokens, token = row % tokens;
  const float* from = x + batch * x_batch + blockIdx.y * x_head + token * x_token;
  float* to = y + batch * y_batch + blockIdx.y * y_head + token * y_token;
  const int64_t id = ids ? ids[row] : first_id + batch * batch_ids + token;
  const bool known = id >= 0 && id < positions;
  for (int32_t i = threadIdx.x; i < half; i += kThreads) {
    const int32_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
    const float a = from[first], b = from[second], nan = __int_as_float(0x7fc00000);
    const float c = known ? cos[id * half + i] : nan;
    float s = known ? sin[id * half + i] : nan;
    if (backward) s = -s;
    to[first] = one_nan(sub_rn(mul_rn(a, c), mul_rn(b, s)));
    to[second] = one_nan(add_rn(mul_rn(b, c), mul_rn(a, s)));
  }
  for (int32_t i = 2 * half + threadIdx.x; i < size; i += kThreads) to[i] = from[i];
}
