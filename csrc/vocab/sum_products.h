// Sums of outer products, over F16: what gradients of projections are. Include base/spans.h and
// base/counts.h first.
#pragma once
#include "base/counts.h"
#include "base/spans.h"
#include "vocab/vocab.h"

namespace bitnet {
namespace {

template <int N>
struct Count {
  static constexpr int value = N;
};

constexpr int64_t kSumDepth = 128;  // terms added before the next outputs: their b stays in L1

// Outputs [n, n + R) x [k, k + 16 W): terms [begin, end). The last vector may be partial.
template <int R, int W, class Span>
BITNET_INLINE void sum_tile(const SumProducts& p, int64_t n, int64_t k, int64_t begin, int64_t end,
                            Span span) {
  float* out = p.out + n * p.out_stride + k;
  F16 sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = load(out + r * p.out_stride + 16 * w, span);
  for (int64_t m = begin; m < end; ++m) {
    const float* a = p.a + m * p.a_term + n * p.a_output;
    const float* b = p.b + m * p.b_stride + k;
    F16 x[W];
    for (int w = 0; w < W; ++w) x[w] = load(b + 16 * w, span);
    for (int r = 0; r < R; ++r) {
      const F16 factor = set1(a[r * p.a_output]);
      for (int w = 0; w < W; ++w) sum[r][w] = fma(factor, x[w], sum[r][w]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) store(out + r * p.out_stride + 16 * w, sum[r][w], span);
}

void sum_products(const SumProducts& p, int64_t first, int64_t last) {
  constexpr int R = kLaneRegisters >= 32 ? 6 : kLaneRegisters >= 16 ? 4 : 3;
  constexpr int W = kLaneRegisters >= 32 ? 4 : kLaneRegisters >= 16 ? 2 : 1;
  const auto outputs = [&](int64_t k, int64_t begin, int64_t end, auto width, auto span) {
    for (int64_t n = first; n < last; n += R)
      with_count<R>(last - n,
                    [&]<int N> { sum_tile<N, decltype(width)::value>(p, n, k, begin, end, span); });
  };
  for (int64_t begin = 0; begin < p.terms; begin += kSumDepth) {
    const int64_t end = begin + kSumDepth < p.terms ? begin + kSumDepth : p.terms;
    int64_t k = 0;
    for (; k + 16 * W <= p.width; k += 16 * W) outputs(k, begin, end, Count<W>{}, Whole{});
    for (; k + 16 <= p.width; k += 16) outputs(k, begin, end, Count<1>{}, Whole{});
    if (k < p.width) outputs(k, begin, end, Count<1>{}, Part{int(p.width - k)});
  }
}

}  // namespace
}  // namespace bitnet
