// The rotation of rotary position embedding over sixteen lanes (Su et al., "RoFormer",
// arXiv:2104.09864). Include a lanes header first.
//
//   y[i] = x[i] cos[i] - x[i + half] sin[i],  y[i + half] = x[i + half] cos[i] + x[i] sin[i]
//
// Products are rounded before the sum, as the reference code of the checkpoints does.
#pragma once
#include "base/spans.h"

namespace bitnet {
namespace {

// y may be x.
BITNET_INLINE void rotate(const float* x, float* y, const float* cos, const float* sin,
                          int64_t half) {
  each_span(half, [&](int64_t i, auto span) {
    const F16 a = load(x + i, span), b = load(x + half + i, span);
    const F16 c = load(cos + i, span), s = load(sin + i, span);
    store(y + i, one_nan(sub(mul(a, c), mul(b, s))), span);
    store(y + half + i, one_nan(add(mul(b, c), mul(a, s))), span);
  });
}

}  // namespace
}  // namespace bitnet
