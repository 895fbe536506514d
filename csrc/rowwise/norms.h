// Norms of rows, with or without int8 quantisation, over sixteen lanes. Include a lanes header
// first.
//
//   rms    y = (x * r) * w (+ b),            r = 1 / sqrt(mean(x^2) + eps)
//   layer  y = ((x - mean) * r) * w + b,     r = 1 / sqrt(mean((x - mean)^2) + eps)
//   none   y = x
//   s = 127 / max(absmax(y), 1e-5),  q = clamp(rint(y * s), -128, 127), ties to even
//
// A row of y that holds NaN or an infinity quantises to q = 0 and s = NaN, so whatever is computed
// from it is NaN. Squares that overflow give r = 0 and so y = 0 (+ b), as in float32 elsewhere.
#pragma once
#include "base/spans.h"
#include "rowwise/rowwise.h"

namespace bitnet {
namespace {

struct Moments {
  float mean, r;
};

template <NormKind kind>
BITNET_INLINE Moments moments(const float* x, int64_t n, float eps) {
  if (kind == NormKind::none) return {0.0f, 1.0f};
  float mean = 0.0f;
  if (kind == NormKind::layer) {
    F16 sum = zero();
    each_span(n, [&](int64_t i, auto span) { sum = add(sum, load(x + i, span)); });
    mean = reduce_add(sum) / float(n);
  }
  F16 squares = zero();
  const F16 centre = set1(mean);
  each_span(n, [&](int64_t i, auto span) {
    F16 v = load(x + i, span);
    if (kind == NormKind::layer) v = keep(sub(v, centre), zero(), span);
    squares = fma(v, v, squares);
  });
  return {mean, 1.0f / __builtin_sqrtf(reduce_add(squares) / float(n) + eps)};
}

template <NormKind kind, class Span>
BITNET_INLINE F16 normed(const float* x, const Norm& norm, Moments m, int64_t i, Span span) {
  F16 y = load(x + i, span);
  if (kind == NormKind::none) return y;
  if (kind == NormKind::layer) y = sub(y, set1(m.mean));
  y = mul(y, set1(m.r));
  if (norm.weight) y = mul(y, load(norm.weight + i, span));
  if (norm.bias) y = add(y, load(norm.bias + i, span));
  return y;
}

template <NormKind kind>
void norm_row(const float* x, int64_t n, const Norm& norm, const NormStats& stats, int64_t row,
              float* out) {
  const Moments m = moments<kind>(x, n, norm.eps);
  if (stats.mean) stats.mean[row] = one_nan(m.mean);
  if (stats.inv_std) stats.inv_std[row] = one_nan(m.r);
  each_span(n, [&](int64_t i, auto span) {
    store(out + i, one_nan(normed<kind>(x, norm, m, i, span)), span);
  });
}

template <NormKind kind>
BITNET_INLINE void quantise_row(const float* x, int64_t n, const Norm& norm, Moments m, int32_t top,
                                const Quantised& out, int64_t row) {
  const float absmax = as_float(top);
  const float s =
      top < 0x7f800000 ? 127.0f / (absmax > 1e-5f ? absmax : 1e-5f) : __builtin_nanf("");
  int8_t* q = out.q + row * out.stride;
  each_span(n, [&](int64_t i, auto span) {
    store_i8(q + i, mul(normed<kind>(x, norm, m, i, span), set1(s)), span);
  });
  out.scales[row] = s;
}

template <NormKind kind>
void norm_quant_row(const float* x, int64_t n, const Norm& norm, const Quantised& out,
                    int64_t row) {
  const Moments m = moments<kind>(x, n, norm.eps);
  I16 top = set1_int(0);
  each_span(n, [&](int64_t i, auto span) {
    // A bias or a mean reaches the lanes past the end.
    top = max(top, bits(keep(abs(normed<kind>(x, norm, m, i, span)), zero(), span)));
  });
  quantise_row<kind>(x, n, norm, m, reduce_max(top), out, row);
}

void norm_quant_row(const float* x, int64_t n, const Norm& norm, const Quantised& out,
                    int64_t row) {
  if (norm.kind == NormKind::rms) return norm_quant_row<NormKind::rms>(x, n, norm, out, row);
  if (norm.kind == NormKind::layer) return norm_quant_row<NormKind::layer>(x, n, norm, out, row);
  norm_quant_row<NormKind::none>(x, n, norm, out, row);
}

void norm_rows(const RowsIn& x, const Norm& norm, const NormStats& stats, const RowsOut& y,
               int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* in = x.data + row * x.stride;
    float* out = y.data + row * y.stride;
    if (norm.kind == NormKind::rms)
      norm_row<NormKind::rms>(in, x.width, norm, stats, row, out);
    else if (norm.kind == NormKind::layer)
      norm_row<NormKind::layer>(in, x.width, norm, stats, row, out);
    else
      norm_row<NormKind::none>(in, x.width, norm, stats, row, out);
  }
}

void norm_quant(const RowsIn& x, const Norm& norm, const Quantised& q, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    norm_quant_row(x.data + row * x.stride, x.width, norm, q, row);
}

void quantise(const RowsIn& x, const int32_t* tops, const Quantised& q, int64_t begin,
              int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    quantise_row<NormKind::none>(x.data + row * x.stride, x.width, {}, {}, tops[row], q, row);
}

}  // namespace
}  // namespace bitnet
