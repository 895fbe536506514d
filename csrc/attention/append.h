// rope_append for one row, over F16. Include a lanes header first.
#pragma once
#include "attention/attention.h"
#include "rowwise/rotate.h"

namespace bitnet {
namespace {

BITNET_INLINE void narrow(float* to, F16 x, int n) { store_partial(to, x, n); }
BITNET_INLINE void narrow(uint16_t* to, F16 x, int n) { store_f16_partial(to, x, n); }
BITNET_INLINE void narrow(int8_t* to, F16 x, int n) { store_i8_partial(to, x, n); }

struct Int8Scale {
  float multiply, stored;
};

// absmax / 127; a vector with NaN or infinity in it gets a NaN scale, so that it shows.
BITNET_INLINE Int8Scale int8_scale(const float* x, int32_t n) {
  F16 largest = zero();
  uint32_t bad = 0;
  const F16 infinity = set1(__builtin_inff());
  for (int32_t i = 0; i < n; i += 16) {
    const int m = n - i < 16 ? n - i : 16;
    const F16 a = abs(load_partial(x + i, m));
    bad |= ~mask_bits(lt(a, infinity)) & 0xffffu;
    largest = max(largest, a);
  }
  if (bad) return {0.0f, __builtin_nanf("")};
  const float absmax = reduce_max(largest), bounded = absmax > 1e-30f ? absmax : 1e-30f;
  return {127.0f / bounded, bounded / 127.0f};
}

// `x` of a token into element `i * stride` for i < n; the int8 scale into *scale.
template <class T>
BITNET_INLINE void put(const float* x, int32_t n, T* to, int32_t stride, float* scale) {
  float multiply = 1.0f;
  if (sizeof(T) == 1) {
    const Int8Scale s = int8_scale(x, n);
    multiply = s.multiply;
    *scale = s.stored;
  }
  for (int32_t i = 0; i < n; i += 16) {
    const int m = n - i < 16 ? n - i : 16;
    F16 value = load_partial(x + i, m);
    if (sizeof(T) == 1) value = mul(value, set1(multiply));
    if (stride == 1) {
      narrow(to + i, value, m);
      continue;
    }
    T lanes[16];
    narrow(lanes, value, m);
    for (int j = 0; j < m; ++j) to[int64_t(i + j) * stride] = lanes[j];
  }
}

template <class T>
void append_as(const AppendTask& t) {
  if (t.cos)
    for (int32_t h = 0; h < t.q_heads + t.kv_heads; ++h)
      rotate(t.row + int64_t(h) * t.dk, t.row + int64_t(h) * t.dk, t.cos, t.sin, t.dk / 2);
  const float* k = t.row + int64_t(t.q_heads) * t.dk;
  const float* v = k + int64_t(t.kv_heads) * t.dk;
  for (int32_t h = 0; h < t.kv_heads; ++h) {
    uint8_t* page = t.page + h * page_bytes(t.dtype, t.dk, t.dv);
    T* keys = reinterpret_cast<T*>(page);
    T* values = keys + kPageTokens * t.dk;
    float* scales = reinterpret_cast<float*>(values + kPageTokens * t.dv);  // int8 only
    T* lane = keys + int64_t(t.slot / 16) * t.dk * 16 + t.slot % 16;
    put(k + int64_t(h) * t.dk, t.dk, lane, 16, scales + t.slot);
    put(v + int64_t(h) * t.dv, t.dv, values + int64_t(t.slot) * t.dv, 1,
        scales + kPageTokens + t.slot);
  }
}

void append(const AppendTask& task) {
  if (task.dtype == Dtype::f32)
    append_as<float>(task);
  else if (task.dtype == Dtype::f16)
    append_as<uint16_t>(task);
  else
    append_as<int8_t>(task);
}

}  // namespace
}  // namespace bitnet
