// Gradients of the norms with the bits of csrc/rowwise/norm_backward.h and csrc/bind/norms.cpp:
//
//   t = x * r (rms), (x - mean) * r (layer),  g = dy * w
//   dx = r (g - t mean(g t)) (rms),  r (g - mean(g) - t mean(g t)) (layer)
//   dw = sum over rows of dy * t,  db = sum over rows of dy
//
// A sum over a row has 16 lanes and one tree; one over rows goes over 64 of them in order, and over
// these blocks in order.
#include "norms.cuh"

constexpr int kThreads = 256, kBlockRows = 64;

template <int kKind>
INLINE float centred(float x, float2 moment) {
  return mul_rn(kKind == kLayer ? sub_rn(x, moment.x) : x, moment.y);
}

// dx, and the mean and r of each row. grid (rows), block kThreads
template <int kKind>
__global__ void __launch_bounds__(kThreads)
    norm_backward_rows(const float* dy, int64_t dy_stride,  // [rows][width], strides in elements
                       const float* x, int64_t stride, int32_t width,
                       const float* weight,  // [width] or null
                       float eps,
                       float* dx,             // [rows][width]
                       float* row_moments) {  // [rows][2]
  __shared__ float2 moment, means;
  const int64_t row = blockIdx.x;
  const float *from = x + row * stride, *grads = dy + row * dy_stride;
  if (threadIdx.x < kLanes) {
    const float2 m = moments<kKind>(from, width, eps);
    float sum_g = 0.0f, sum_gt = 0.0f;
    for (int32_t i = threadIdx.x; i < width; i += kLanes) {
      const float g = weight ? mul_rn(grads[i], weight[i]) : grads[i];
      sum_g = add_rn(sum_g, g);
      sum_gt = fma_rn(g, centred<kKind>(from[i], m), sum_gt);
    }
    sum_g = div_rn(lanes_sum(sum_g), to_float(width));
    sum_gt = div_rn(lanes_sum(sum_gt), to_float(width));
    if (threadIdx.x == 0) {
      moment = m, means = make_float2(sum_g, sum_gt);
      row_moments[2 * row] = m.x, row_moments[2 * row + 1] = m.y;
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < width; i += kThreads) {
    float d = weight ? mul_rn(grads[i], weight[i]) : grads[i];
    if (kKind == kLayer) d = sub_rn(d, means.x);
    d = fma_rn(-centred<kKind>(from[i], moment), means.y, d);
    dx[row * width + i] = one_nan(mul_rn(moment.y, d));
  }
}

// dw and db of 64 rows. grid (blocks of rows, ceil(width / 256)), a thread a column
template <int kKind>
__global__ void __launch_bounds__(kThreads)
    norm_backward_columns(const float* dy, int64_t dy_stride, const float* x, int64_t stride,
                          const float* row_moments,  // [rows][2]
                          int64_t rows, int32_t width,
                          float* sums) {  // [blocks][2][width]
  const int32_t i = blockIdx.y * kThreads + threadIdx.x;
  if (i >= width) return;
  const int64_t first = int64_t(blockIdx.x) * kBlockRows;
  const int64_t last = first + kBlockRows < rows ? first + kBlockRows : rows;
  float dw = 0.0f, db = 0.0f;
  for (int64_t row = first; row < last; ++row) {
    const float grad = dy[row * dy_stride + i];
    const float2 moment = make_float2(row_moments[2 * row], row_moments[2 * row + 1]);
    dw = fma_rn(grad, centred<kKind>(x[row * stride + i], moment), dw);
    db = add_rn(grad, db);
  }
  sums[(2 * int64_t(blockIdx.x)) * width + i] = dw;
  sums[(2 * int64_t(blockIdx.x) + 1) * width + i] = db;
}

// grid (ceil(width / 256), 2): dw, then db
__global__ void __launch_bounds__(kThreads)
    add_blocks(const float* sums,  // [blocks][2][width]
               int64_t blocks, int32_t width, float* dw, float* db) {
  const int32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= width) return;
  float sum = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) sum = add_rn(sum, sums[(2 * b + blockIdx.y) * width + i]);
  (blockIdx.y ? db : dw)[i] = one_nan(sum);
}
