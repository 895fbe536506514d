// Vectors on their way from rows q | k | v into a cache: turned by their positions, and rounded.
//
//   y[i]        = x[i] cos[i] - x[i + half] sin[i]           products rounded before the sum,
//   y[i + half] = x[i + half] cos[i] + x[i] sin[i]           as on the CPU (csrc/rowwise/rotate.h)
//
// A warp takes a vector.
#pragma once
#include "codes.cuh"

// Element i of `x`, turned where there are angles.
struct Turned {
  const float *x, *cos, *sin;  // cos null: not turned
  int32_t half;
  INLINE float operator()(int32_t i) const {
    if (!cos) return x[i];
    const int32_t j = i < half ? i : i - half;
    const float a = x[j], b = x[j + half], c = cos[j], s = sin[j];
    return i < half ? sub_rn(mul_rn(a, c), mul_rn(b, s)) : add_rn(mul_rn(b, c), mul_rn(a, s));
  }
};

// n elements, rounded to T, into a row of `width`, zeros past n.
template <class T>
INLINE void put(Turned x, int32_t n, T* to, int32_t width, float*) {
  for (int32_t i = threadIdx.x % 32; i < width; i += 32) to[i] = i < n ? from_float<T>(x(i)) : T{};
}
INLINE void put(Turned x, int32_t n, int8_t* to, int32_t width, float* scale) {
  store_codes(x, n, to, width, scale);
}
