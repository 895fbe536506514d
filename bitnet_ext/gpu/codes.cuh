// int8 codes of a vector with one scale: code = rint(x * 127 / a), scale = a / 127 with a =
// max(absmax, 1e-30). A vector that is not finite has codes 0 and the scale NaN, so that it shows.
// The bits of csrc/attention/append.h.
#pragma once
#include "ptx.cuh"

// Scales that are copied 16 bytes at a time: room for so many vectors'.
INLINE int32_t whole_words(int32_t vectors) { return (vectors + 3) / 4 * 4; }

// A warp's vector: element(i) for i < n into `to`, zeros from there to `width`.
template <class Element>
INLINE void store_codes(Element element, int32_t n, int8_t* to, int32_t width, float* scale) {
  // As integers, absolute values keep their order, and NaN stands above infinity.
  int32_t top = 0;
  for (int32_t i = threadIdx.x % 32; i < n; i += 32)
    top = max(top, __float_as_int(magnitude(element(i))));
  top = __reduce_max_sync(0xffffffffu, top);
  const bool finite = top < 0x7f800000;
  const float bounded = max_num(__int_as_float(top), 1e-30f);
  const float multiply = finite ? div_rn(127.0f, bounded) : 0.0f;
  if (threadIdx.x % 32 == 0) *scale = finite ? div_rn(bounded, 127.0f) : __int_as_float(0x7fc00000);
  for (int32_t i = threadIdx.x % 32; i < width; i += 32) {
    const int32_t code = i < n ? round_to_int(mul_rn(element(i), multiply)) : 0;
    to[i] = int8_t(max(-128, min(127, code)));
  }
}
