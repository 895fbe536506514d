// The first step of screen.cu: a row of hidden states in integers, and the terms of its bound
// (screen.cuh).
#pragma once
#include "screen.cuh"
#include "select.cuh"

constexpr int kWarps = kThreads / 32;

INLINE ScreenRow* row_of(void* rows, int m) { return static_cast<ScreenRow*>(rows) + m; }

INLINE double block_sum(double v, double* warps) {
  for (int by = 16; by > 0; by /= 2) v += __shfl_xor_sync(0xffffffffu, v, by);
  __syncthreads();  // who read `warps` before has done so
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
  for (int i = 0; i < kWarps; ++i) v += warps[i];
  return v;
}

INLINE float block_max(float v, double* warps) {
  v = __int_as_float(__reduce_max_sync(0xffffffffu, __float_as_int(v)));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) v = max_num(v, float(warps[i]));
  return v;
}

struct Split {
  double squares, outliers;  // of the rest, and the sum of |outliers|
};

// An element is an outlier where its share of the bound, 0.5 |x_e|, is less than what it adds to
// the other term: for errors spread evenly, sqrt(width / 12) (change of the norm). Any set will do.
INLINE Split split(const float* x, int width, double* warps) {
  Split found = {};
  double edge = __longlong_as_double(0x7ff0000000000000ll);
  for (int pass = 0; pass < 4; ++pass) {
    double squares = 0, outliers = 0;
    for (int e = threadIdx.x; e < width; e += kThreads) {
      const double size = magnitude(x[e]);
      if (size > edge)
        outliers += size;
      else
        squares += size * size;
    }
    found = {block_sum(squares, warps), block_sum(outliers, warps)};
    edge = sqrt(12.0 / width * found.squares);
  }
  return found;
}

// grid (rows)
__global__ void __launch_bounds__(kThreads)
    screen_query(const float* x,         // [rows][width]
                 const uint8_t* active,  // [rows] or null
                 double top,             // 127.5 max s, or 1 where that is more
                 void* rows,             // [rows] ScreenRow
                 uint8_t* whole,         // [rows]
                 int8_t* pieces,         // [2 rows][spans * kSpan], zeros past the width
                 uint32_t* largest,      // [rows][2][groups], of no lower bound
                 int width, int groups) {
  __shared__ double warps[kWarps];
  const int m = blockIdx.x;
  ScreenRow* row = row_of(rows, m);
  if (threadIdx.x == 0) {
    row->screened = whole[m] = 0;
    row->listed[0] = row->listed[1] = 0;
  }
  if (active && !active[m]) return;
  x += int64_t(m) * width;
  for (int i = threadIdx.x; i < 2 * groups; i += kThreads) largest[int64_t(m) * 2 * groups + i] = 0;

  double sum = 0;
  float most = 0;
  for (int e = threadIdx.x; e < width; e += kThreads) {
    sum += magnitude(x[e]);
    most = max_num(most, magnitude(x[e]));
  }
  sum = block_sum(sum, warps);
  most = block_max(most, warps);
  if (!(sum >= 0x1p-60 && sum * top <= 0x1p100)) {
    if (threadIdx.x == 0) whole[m] = 1;
    return;
  }

  const double step = most * (1.0 / 32512), inverse = div_rn(32512.0f, most);
  const int padded = (width + kSpan - 1) / kSpan * kSpan;
  int8_t *coarse = pieces + int64_t(m) * 2 * padded, *fine = coarse + padded;
  double coarse_sum = 0, fine_sum = 0, sizes = 0, left = 0;
  for (int e = threadIdx.x; e < padded; e += kThreads) {
    const double value = e < width ? x[e] : 0.0f;
    const double rounded = (value * inverse + 6755399441055744.0) - 6755399441055744.0;
    const int32_t whole_number = int32_t(rounded);  // |it| <= 32512
    const int32_t b = ((whole_number + 128) & 255) - 128, a = (whole_number - b) / 256;
    coarse[e] = int8_t(a);
    fine[e] = int8_t(b);
    coarse_sum += a;
    fine_sum += b;
    sizes += 256 * abs(a) + abs(b);
    const double off = value - step * rounded;
    left += off < 0 ? -off : off;
  }
  coarse_sum = block_sum(coarse_sum, warps);
  fine_sum = block_sum(fine_sum, warps);
  sizes = block_sum(sizes, warps);
  left = block_sum(left, warps);
  const Split parts = split(x, width, warps);
  if (threadIdx.x != 0) return;

  const double chains = ((width + 15) / 16 + 8) * 0x1p-24 * (1 + 0x1p-10), raise = 1 + 0x1p-20;
  const double both = 128 * left + chains * 127.5 * sum + 0x1p-19 * 160 * step * sizes;
  row->step = float(step);
  row->centre = float((256 * coarse_sum + fine_sum) * (7.5 / 16));
  row->rest = float(sqrt(parts.squares) * raise);
  row->slack[0] = float((8.001 * parts.outliers + both) * raise);
  row->slack[1] = float((0.501 * parts.outliers + both) * raise);
  row->floor = float(0x1p-100 * (1 + sum) * raise);
  row->coarse_less = 8 * int32_t(coarse_sum);
  row->fine_less = 8 * int32_t(fine_sum);
  row->screened = 1;
}
