// Elements of arrays whose type is known at run time.
#pragma once
#include "ptx.cuh"

enum Kind : int32_t { kF32, kF16, kBf16, kI8 };

INLINE float to_float(int8_t a) { return to_float(int32_t(a)); }

// x, rounded, as element i of `out`: float32, half or bfloat16.
INLINE void write(void* out, int32_t kind, int64_t i, float x) {
  if (kind == kF32)
    static_cast<float*>(out)[i] = x;
  else if (kind == kF16)
    static_cast<half_t*>(out)[i] = from_float<half_t>(x);
  else
    static_cast<bfloat_t*>(out)[i] = from_float<bfloat_t>(x);
}
