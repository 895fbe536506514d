// Gradients of the norms over sixteen lanes. Include a lanes header first.
//
//   t = x * r (rms), (x - mean) * r (layer),  g = dy * w
//   dx = r (g - t mean(g t)) (rms),  r (g - mean(g) - t mean(g t)) (layer)
//   dw = sum over rows of dy * t,  db = sum over rows of dy
//
// Ba, Kiros, Hinton, "Layer Normalization" (arXiv:1607.06450); Zhang, Sennrich, "Root Mean Square
// Layer Normalization" (arXiv:1910.07467).
#pragma once
#include "rowwise/norms.h"

namespace bitnet {
namespace {

// t and g of sixteen elements, zero past the end of the row.
struct Pulled {
  F16 t, g;
};
template <NormKind kind, class Span>
BITNET_INLINE Pulled pulled(const float* x, const float* dy, const float* weight, Moments m,
                            int64_t i, Span span) {
  F16 t = load(x + i, span), g = load(dy + i, span);
  if (kind == NormKind::layer) t = keep(sub(t, set1(m.mean)), zero(), span);
  if (weight) g = mul(g, load(weight + i, span));
  return {mul(t, set1(m.r)), g};
}

template <NormKind kind>
void norm_backward_row(const float* x, const float* dy, int64_t n, const Norm& norm, float* dx,
                       float* dweight, float* dbias) {
  const Moments m = moments<kind>(x, n, norm.eps);
  F16 sum_g = zero(), sum_gt = zero();
  each_span(n, [&](int64_t i, auto span) {
    const Pulled p = pulled<kind>(x, dy, norm.weight, m, i, span);
    sum_g = add(sum_g, p.g);
    sum_gt = fma(p.g, p.t, sum_gt);
    const F16 grad = load(dy + i, span);
    if (dweight) store(dweight + i, fma(grad, p.t, load(dweight + i, span)), span);
    if (dbias) store(dbias + i, add(grad, load(dbias + i, span)), span);
  });
  const F16 mean_g = set1(kind == NormKind::layer ? reduce_add(sum_g) / float(n) : 0.0f);
  const F16 mean_gt = set1(reduce_add(sum_gt) / float(n));
  each_span(n, [&](int64_t i, auto span) {
    const Pulled p = pulled<kind>(x, dy, norm.weight, m, i, span);
    F16 d = p.g;
    if (kind == NormKind::layer) d = sub(d, mean_g);
    d = mul(set1(m.r), fma(neg(p.t), mean_gt, d));
    store(dx + i, one_nan(d), span);
  });
}

void norm_backward(const RowsIn& x, const Norm& norm, const RowsIn& dy, const RowsOut& dx,
                   float* dweight, float* dbias, int64_t begin, int64_t end) {
  each_span(x.width, [&](int64_t i, auto span) {
    if (dweight) store(dweight + i, zero(), span);
    if (dbias) store(dbias + i, zero(), span);
  });
  for (int64_t row = begin; row < end; ++row) {
    const float *in = x.data + row * x.stride, *grad = dy.data + row * dy.stride;
    float* out = dx.data + row * dx.stride;
    if (norm.kind == NormKind::layer)
      norm_backward_row<NormKind::layer>(in, grad, x.width, norm, out, dweight, dbias);
    else
      norm_backward_row<NormKind::rms>(in, grad, x.width, norm, out, dweight, dbias);
  }
}

}  // namespace
}  // namespace bitnet
