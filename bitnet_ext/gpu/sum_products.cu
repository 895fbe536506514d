// Sums of outer products, which gradients of projections are, with the bits of
// csrc/vocab/sum_products.h:
//
//   out[n][k] += sum over m of a[m][n] * b[m][k]
//
// Each output is one chain of fused multiply-adds from what it was, m ascending. A block has 64 x
// 128 outputs, a thread 8 x 4 of them: numbers of a are the same for a warp.
#include "ptx.cuh"

constexpr int kThreads = 256, kOutputs = 64, kWidth = 128, kDepth = 16;
constexpr int kEachOutput = 8, kEachColumn = 4;

struct alignas(16) Slice {  // kDepth terms
  float a[kDepth][kOutputs], b[kDepth][kWidth];
};

struct Sums {
  const float* a;  // term m, output n at m * term + n * output
  int64_t term, output;
  const float* b;  // [terms][width], rows b_stride apart
  int64_t b_stride;
  int32_t terms, outputs, width;
  int32_t first_output, first_column;
};

// A thread's numbers of the next slice, on their way.
struct Held {
  float a[kDepth * kOutputs / kThreads], b[kDepth * kWidth / kThreads];
};

// The i-th number of a that this thread brings: neighbouring threads read neighbouring numbers.
INLINE int2 place_in_a(const Sums& sums, int i) {
  const int at = i * kThreads + threadIdx.x;  // of (term, output)
  return sums.output == 1 ? make_int2(at / kOutputs, at % kOutputs)
                          : make_int2(at % kDepth, at / kDepth);
}

INLINE void load(const Sums& sums, int32_t start, Held& held) {
#pragma unroll
  for (int i = 0; i < kDepth * kOutputs / kThreads; ++i) {
    const int2 at = place_in_a(sums, i);
    const int32_t m = start + at.x, n = sums.first_output + at.y;
    const bool valid = m < sums.terms && n < sums.outputs;
    held.a[i] = valid ? sums.a[m * sums.term + n * sums.output] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kDepth * kWidth / kThreads; ++i) {
    const int at = i * kThreads + threadIdx.x;
    const int32_t m = start + at / kWidth, k = sums.first_column + at % kWidth;
    const bool valid = m < sums.terms && k < sums.width;
    held.b[i] = valid ? sums.b[m * sums.b_stride + k] : 0.0f;
  }
}

INLINE void store(const Sums& sums, const Held& held, Slice& slice) {
#pragma unroll
  for (int i = 0; i < kDepth * kOutputs / kThreads; ++i) {
    const int2 at = place_in_a(sums, i);
    slice.a[at.x][at.y] = held.a[i];
  }
#pragma unroll
  for (int i = 0; i < kDepth * kWidth / kThreads; ++i) {
    const int at = i * kThreads + threadIdx.x;
    slice.b[at / kWidth][at % kWidth] = held.b[i];
  }
}

// grid (ceil(outputs / 64) x ceil(width / 128)), block kThreads
__global__ void __launch_bounds__(kThreads)
    sum_products(const float* a, int64_t term, int64_t output, const float* b, int64_t b_stride,
                 float* out, int64_t out_stride, int32_t terms, int32_t outputs, int32_t width) {
  __shared__ Slice slices[2];
  const int tiles = (width + kWidth - 1) / kWidth;
  const Sums sums = {a,
                     term,
                     output,
                     b,
                     b_stride,
                     terms,
                     outputs,
                     width,
                     int32_t(blockIdx.x) / tiles * kOutputs,
                     int32_t(blockIdx.x) % tiles * kWidth};
  const int own_output = threadIdx.x / 32 * kEachOutput,
            own_column = threadIdx.x % 32 * kEachColumn;
  const int32_t n = sums.first_output + own_output, k = sums.first_column + own_column;
  float total[kEachOutput][kEachColumn];
#pragma unroll
  for (int i = 0; i < kEachOutput; ++i)
#pragma unroll
    for (int j = 0; j < kEachColumn; ++j)
      total[i][j] = n + i < outputs && k + j < width ? out[(n + i) * out_stride + k + j] : 0.0f;
  Held held;
  load(sums, 0, held);
  store(sums, held, slices[0]);
  for (int32_t start = 0, now = 0; start < terms; start += kDepth, now ^= 1) {
    __syncthreads();
    load(sums, start + kDepth, held);
    const int count = min(kDepth, terms - start);  // no term that is not there: 0 * NaN is NaN
#pragma unroll 4
    for (int m = 0; m < count; ++m) {
      float x[kEachOutput];
      *reinterpret_cast<float4*>(x) =
          *reinterpret_cast<const float4*>(slices[now].a[m] + own_output);
      *reinterpret_cast<float4*>(x + 4) =
          *reinterpret_cast<const float4*>(slices[now].a[m] + own_output + 4);
      const float4 y = *reinterpret_cast<const float4*>(slices[now].b[m] + own_column);
#pragma unroll
      for (int i = 0; i < kEachOutput; ++i) {
        total[i][0] = fma_rn(x[i], y.x, total[i][0]);
        total[i][1] = fma_rn(x[i], y.y, total[i][1]);
        total[i][2] = fma_rn(x[i], y.z, total[i][2]);
        total[i][3] = fma_rn(x[i], y.w, total[i][3]);
      }
    }
    store(sums, held, slices[now ^ 1]);
  }
#pragma unroll
  for (int i = 0; i < kEachOutput; ++i)
#pragma unroll
    for (int j = 0; j < kEachColumn; ++j)
      if (n + i < outputs && k + j < width) out[(n + i) * out_stride + k + j] = total[i][j];
}
