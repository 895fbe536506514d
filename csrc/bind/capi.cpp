// The C ABI capsule of bitnet_ext/capi.h. No exception leaves a function of its table.
#include "bitnet_ext/capi.h"

#include <cmath>
#include <new>

#include "attention/attention.h"
#include "attention/dense.h"
#include "base/arena.h"
#include "bind/bind.h"
#include "run/run.h"

namespace bitnet {
namespace {

constexpr int64_t kMost = kMaskLimit;  // sizes whose products with a few bytes fit int64

const TernaryMatrix* matrix(const BitnetExtTernary* weight) {
  return reinterpret_cast<const TernaryMatrix*>(weight);
}

template <class F>
int32_t guarded(F&& work) {
  try {
    const FpEnv environment;
    work();
    return BITNET_EXT_OK;
  } catch (const std::bad_alloc&) {
    return BITNET_EXT_NO_MEMORY;
  } catch (...) {
    return BITNET_EXT_FAILED;
  }
}

// Whether `data` can hold rows of `width` elements, `stride` elements apart.
bool fits(const void* data, int64_t rows, int64_t width, int64_t stride) {
  if (rows < 0 || rows > kMost || width < 0 || width > kMost) return false;
  if (rows == 0 || width == 0) return true;
  return data && (rows == 1 || stride >= width);
}

int32_t causal_mask_fill(void* out, int64_t row_bytes, int32_t mask, int64_t q_len, int64_t k_len,
                         int64_t past_len, int64_t window_left, int64_t prefix) {
  if (mask < BITNET_EXT_MASK_F32 || mask > BITNET_EXT_MASK_BOOL) return BITNET_EXT_INVALID;
  const MaskElement element{mask};
  const MaskSizes sizes = {q_len, k_len, past_len, window_left < 0 ? kUnbounded : window_left,
                           prefix};
  if (!mask_sizes_valid(sizes)) return BITNET_EXT_INVALID;
  const int64_t width_bytes = k_len * mask_element_bytes(element);
  const int64_t distance = row_bytes < 0 ? -(row_bytes + 1) : row_bytes;
  if (!fits(out, q_len, width_bytes, distance + (row_bytes < 0))) return BITNET_EXT_INVALID;
  return guarded([&] { run_mask_fill(out, element, sizes, q_len, k_len, row_bytes); });
}

const BitnetExtTernary* ternary_weight(void* object) {
  const py::handle handle(static_cast<PyObject*>(object));
  if (handle && py::isinstance<TernaryMatrix>(handle))
    return reinterpret_cast<const BitnetExtTernary*>(handle.cast<const TernaryMatrix*>());
  PyErr_Format(PyExc_TypeError, "weight: found %s, wanted bitnet_ext.PackedTernary",
               handle ? Py_TYPE(handle.ptr())->tp_name : "no object");
  return nullptr;
}

int32_t ternary_shape(const BitnetExtTernary* weight, int64_t* n, int64_t* k) {
  if (!weight || !n || !k) return BITNET_EXT_INVALID;
  *n = matrix(weight)->n;
  *k = matrix(weight)->k;
  return BITNET_EXT_OK;
}

int32_t ternary_matmul(const int8_t* q, int64_t rows, int64_t q_stride,
                       const BitnetExtTernary* weight, int32_t* out, int64_t out_stride) {
  if (!weight) return BITNET_EXT_INVALID;
  const TernaryMatrix& w = *matrix(weight);
  if (!fits(q, rows, w.k, q_stride) || !fits(out, rows, w.n, out_stride)) return BITNET_EXT_INVALID;
  TernaryProduct p{};
  p.q = q, p.rows = rows, p.q_stride = q_stride;
  p.acc = out, p.out_stride = out_stride;
  return guarded([&] { run_ternary(w, p); });
}

int32_t ternary_linear(const float* x, int64_t rows, int64_t x_stride,
                       const BitnetExtTernary* weight, const float* bias, float* out,
                       int64_t out_stride) {
  if (!weight) return BITNET_EXT_INVALID;
  const TernaryMatrix& w = *matrix(weight);
  if (!fits(x, rows, w.k, x_stride) || !fits(out, rows, w.n, out_stride)) return BITNET_EXT_INVALID;
  return guarded([&] {
    const Buffer codes(size_t(rows * w.k) + 1), scales(size_t(rows + 1) * sizeof(float));
    const Quantised quantised = {static_cast<int8_t*>(codes.data()), w.k,
                                 static_cast<float*>(scales.data())};
    const Norm none{NormKind::none, 0.0f, nullptr, nullptr};
    run_norm_quant({x, x_stride, w.k}, none, quantised, rows);
    TernaryProduct p{};
    p.q = quantised.q, p.rows = rows, p.q_stride = w.k;
    p.s = quantised.scales, p.bias = bias;
    p.out = out, p.out_stride = out_stride;
    run_ternary(w, p);
  });
}

HeadsView view_of(const BitnetExtHeads& h) {
  return {h.data, h.heads, h.rows, h.size, h.batch_stride, h.head_stride, h.row_stride};
}

constexpr int64_t kMostHeads = 1 << 20;  // and sequences: all heads of all fit int64

bool valid(const BitnetExtHeads* h, int64_t batch) {
  if (!h || h->heads < 0 || h->heads > kMostHeads || h->rows < 0 || h->rows >= kFar) return false;
  if (h->size < 0 || h->size > kMaxHeadDim) return false;
  return h->data || batch == 0 || h->heads == 0 || h->rows == 0 || h->size == 0;
}

bool agree(const BitnetExtHeads& q, const BitnetExtHeads& k, const BitnetExtHeads& v,
           const BitnetExtHeads& out) {
  return q.size > 0 && q.size == k.size && k.heads == v.heads && k.rows == v.rows &&
         out.heads == q.heads && out.rows == q.rows && out.size == v.size &&
         (k.heads ? q.heads % k.heads == 0 : q.heads == 0);
}

bool lengths_valid(const int64_t* lengths, int64_t batch, int64_t keys) {
  for (int64_t b = 0; lengths && b < batch; ++b)
    if (lengths[b] < 0 || lengths[b] > keys) return false;
  return true;
}

int32_t attention(const BitnetExtHeads* q, const BitnetExtHeads* k, const BitnetExtHeads* v,
                  const BitnetExtHeads* out, int64_t batch, const int64_t* kv_lengths,
                  int32_t causal, int64_t past_len, int64_t window_left, int64_t window_right,
                  float scale, float softcap) {
  if (batch < 0 || batch > kMostHeads || !valid(q, batch) || !valid(k, batch) || !valid(v, batch) ||
      !valid(out, batch))
    return BITNET_EXT_INVALID;
  if (!agree(*q, *k, *v, *out) || !lengths_valid(kv_lengths, batch, k->rows) || past_len < 0 ||
      past_len >= kFar || (kv_lengths && past_len) || !std::isfinite(scale) ||
      !std::isfinite(softcap) || softcap < 0)
    return BITNET_EXT_INVALID;
  return guarded([&] {
    run_attention({view_of(*q), view_of(*k), view_of(*v), view_of(*out), batch, kv_lengths,
                   causal != 0, past_len, window_left, window_right, scale, softcap});
  });
}

constexpr BitnetExtApi kApi = {
    BITNET_EXT_ABI_VERSION, sizeof(BitnetExtApi), causal_mask_fill, ternary_weight,
    ternary_shape,          ternary_matmul,       ternary_linear,   attention,
};

}  // namespace

void bind_capi(py::module_& m) { m.attr("_C_API") = py::capsule(&kApi, BITNET_EXT_CAPSULE); }

}  // namespace bitnet
