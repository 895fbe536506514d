// The row kernels over sixteen lanes; included once by each ISA's file, after its lanes header.
// Every NaN written is the one quiet NaN.
#pragma once
#include "base/spans.h"
#include "rowwise/math.h"
#include "rowwise/norm_backward.h"
#include "rowwise/norms.h"
#include "rowwise/rotate.h"
#include "rowwise/rowwise.h"

namespace bitnet {
namespace {

// --- activations ------------------------------------------------------------------------------
template <Activation act>
BITNET_INLINE F16 activate(F16 x) {
  const F16 one = set1(1.0f);
  if (act == Activation::relu2) {
    const F16 t = max(zero(), x);  // NaN stays
    return mul(t, t);
  }
  if (act == Activation::silu) return div(x, add(one, exp(neg(x))));
  const F16 half = mul(x, set1(0.5f));
  if (act == Activation::gelu) return mul(half, add(one, erf(mul(x, set1(0x1.6a09e6p-1f)))));
  // sqrt(2 / pi) (x + 0.044715 x^3)
  const F16 cubic = fma(mul(set1(0.044715f), mul(x, x)), x, x);
  return mul(half, add(one, tanh(mul(set1(0x1.988454p-1f), cubic))));
}

// y = act(x) * factor, whose largest elements are returned, in any lanes.
template <Activation act>
I16 activate_row(const float* x, const float* factor, int64_t n, float* y) {
  I16 top = set1_int(0);
  each_span(n, [&](int64_t i, auto span) {
    F16 v = activate<act>(load(x + i, span));
    if (factor) v = mul(v, load(factor + i, span));
    store(y + i, v, span);
    top = max(top, bits(keep(abs(v), zero(), span)));
  });
  return top;
}

I16 activate_row(Activation act, const float* x, const float* factor, int64_t n, float* y) {
  switch (act) {
    case Activation::relu2:
      return activate_row<Activation::relu2>(x, factor, n, y);
    case Activation::silu:
      return activate_row<Activation::silu>(x, factor, n, y);
    case Activation::gelu:
      return activate_row<Activation::gelu>(x, factor, n, y);
    case Activation::gelu_tanh:
      return activate_row<Activation::gelu_tanh>(x, factor, n, y);
  }
  __builtin_unreachable();
}

void activate(const RowsIn& x, Activation act, bool gated, const RowsOut& y, int32_t* tops,
              int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* in = x.data + row * x.stride;
    const I16 top =
        activate_row(act, in, gated ? in + x.width : nullptr, x.width, y.data + row * y.stride);
    if (tops) tops[row] = reduce_max(top);
  }
}

void act_quant(const RowsIn& x, Activation act, bool gated, const Norm& norm, const Quantised& q,
               float* scratch, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* in = x.data + row * x.stride;
    const I16 top = activate_row(act, in, gated ? in + x.width : nullptr, x.width, scratch);
    if (norm.kind == NormKind::none)
      quantise_row<NormKind::none>(scratch, x.width, norm, {}, reduce_max(top), q, row);
    else
      norm_quant_row(scratch, x.width, norm, q, row);
  }
}

// --- embeddings -------------------------------------------------------------------------------
void embed(const void* table, Dtype dtype, int64_t stride, const int32_t* ids, const RowsOut& y,
           int64_t width, int64_t begin, int64_t end) {
  with_rows(table, dtype, stride, [&](auto row_at) {
    for (int64_t i = begin; i < end; ++i) {
      const auto row = row_at(ids[i]);
      float* out = y.data + i * y.stride;
      each_span(width, [&](int64_t k, auto span) { store(out + k, row.at(k, span), span); });
    }
  });
}

void add_rows(const RowsIn& table, const int32_t* ids, const RowsOut& x, int64_t begin,
              int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float* row = table.data + ids[i] * table.stride;
    float* out = x.data + i * x.stride;
    each_span(table.width, [&](int64_t k, auto span) {
      store(out + k, add(load(out + k, span), load(row + k, span)), span);
    });
  }
}

// --- rotary position embedding ----------------------------------------------------------------
// The same rotation of neighbours x[2i], x[2i + 1].
BITNET_INLINE void rotate_pairs(const float* x, float* y, const float* cos, const float* sin,
                                int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    y[2 * i] = one_nan(a * cos[i] - b * sin[i]);
    y[2 * i + 1] = one_nan(b * cos[i] + a * sin[i]);
  }
}

void rotary(const Rotary& r, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t batch = begin / r.tokens, first = batch * r.tokens;
    const int64_t stop = end < first + r.tokens ? end : first + r.tokens;
    // Heads outside: the tokens of a call are few, and their angles stay in L1.
    for (int64_t head = 0; head < r.heads; ++head)
      for (int64_t token = begin; token < stop; ++token) {
        const int64_t t = token - first, angle = (r.ids ? r.ids[token] : token) * r.half;
        const float* x = r.x + batch * r.x_batch + head * r.x_head + t * r.x_token;
        float* y = r.y + batch * r.y_batch + head * r.y_head + t * r.y_token;
        if (r.interleaved)
          rotate_pairs(x, y, r.cos + angle, r.sin + angle, r.half);
        else
          rotate(x, y, r.cos + angle, r.sin + angle, r.half);
        each_span(r.size - 2 * r.half, [&](int64_t i, auto span) {
          store(y + 2 * r.half + i, load(x + 2 * r.half + i, span), span);
        });
      }
    begin = stop;
  }
}

// --- log-softmax ------------------------------------------------------------------------------
// log_softmax(x)[i] = (x[i] - max) - log(sum exp(x - max)). A row with NaN or +inf, or all -inf, is
// all NaN. Sums run over 512 elements and those sums over the row, so 128k small terms lose
// nothing.
struct Normaliser {
  float max, log_sum;  // both NaN for such a row
};

BITNET_INLINE Normaliser normaliser(const float* x, int64_t n) {
  const F16 lowest = set1(-__builtin_inff());
  F16 top = lowest;
  each_span(n,
            [&](int64_t i, auto span) { top = max(top, keep(load(x + i, span), lowest, span)); });
  const float m = reduce_max(top);
  const F16 shift = set1(m);
  F16 total = zero();
  for (int64_t block = 0; block < n; block += 512) {
    F16 sum = zero();
    each_span(n - block < 512 ? n - block : 512, [&](int64_t i, auto span) {
      sum = add(sum, keep(exp(sub(load(x + block + i, span), shift)), zero(), span));
    });
    total = add(total, sum);
  }
  // NaN reaches the sum from wherever it stands; inf - inf makes one of the other two cases.
  const float sum = reduce_add(total);
  if (sum != sum) return {__builtin_nanf(""), __builtin_nanf("")};
  float logs[16];
  store(logs, log(set1(sum)));
  return {m, logs[0]};
}

void log_softmax(const RowsIn& x, const RowsOut& y, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* in = x.data + row * x.stride;
    float* out = y.data + row * y.stride;
    const Normaliser z = normaliser(in, x.width);
    each_span(x.width, [&](int64_t i, auto span) {
      const F16 v = sub(sub(load(in + i, span), set1(z.max)), set1(z.log_sum));
      store(out + i, one_nan(v), span);
    });
  }
}

void log_softmax_gather(const RowsIn& x, const int32_t* targets, float* y, bool* greedy,
                        int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* in = x.data + row * x.stride;
    const Normaliser z = normaliser(in, x.width);
    const int64_t target = targets[row];
    y[row] = one_nan((in[target] - z.max) - z.log_sum);
    bool first = in[target] == z.max;
    for (int64_t i = 0; first && i < target; ++i) first = in[i] != z.max;
    greedy[row] = first;
  }
}

// --- single functions -------------------------------------------------------------------------
template <class Function>
BITNET_INLINE void map(const float* x, float* y, int64_t n, Function f) {
  each_span(n, [&](int64_t i, auto span) { store(y + i, f(load(x + i, span)), span); });
}

void unary(Unary op, const float* x, float* y, int64_t n) {
  switch (op) {
    case Unary::exp:
      return map(x, y, n, [](F16 v) { return exp(v); });
    case Unary::log:
      return map(x, y, n, [](F16 v) { return log(v); });
    case Unary::tanh:
      return map(x, y, n, [](F16 v) { return tanh(v); });
    case Unary::erf:
      return map(x, y, n, [](F16 v) { return erf(v); });
    case Unary::relu2:
      activate_row(Activation::relu2, x, nullptr, n, y);
      return;
    case Unary::silu:
      activate_row(Activation::silu, x, nullptr, n, y);
      return;
    case Unary::gelu:
      activate_row(Activation::gelu, x, nullptr, n, y);
      return;
    case Unary::gelu_tanh:
      activate_row(Activation::gelu_tanh, x, nullptr, n, y);
      return;
    case Unary::f16:
      return map(x, y, n, [](F16 v) {
        uint16_t halves[16];
        store_f16(halves, v);
        return load_f16(halves);
      });
  }
}

}  // namespace
}  // namespace bitnet

#define BITNET_ROWWISE_KERNELS(isa)                                                    \
  {#isa,  norm_rows, norm_quant, quantise,    norm_backward,      activate, act_quant, \
   embed, add_rows,  rotary,     log_softmax, log_softmax_gather, unary}
