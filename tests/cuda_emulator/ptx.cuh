// The functions of bitnet_ext/gpu/ptx.cuh for the host's compiler.
#pragma once
#include "runtime.h"

struct half_t {
  uint16_t bits;
};
struct bfloat_t {
  uint16_t bits;
};

#define INLINE inline
#define DYNAMIC_SHARED(name) uint8_t* const name = emulated::machine.shared
#define INFINITY_F INFINITY

inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return sqrtf(a); }
inline float max_num(float a, float b) { return fmaxf(a, b); }
inline float min_num(float a, float b) { return fminf(a, b); }
inline float magnitude(float a) { return fabsf(a); }
inline float one_nan(float a) { return std::isnan(a) ? __uint_as_float(0x7fc00000) : a; }
inline int32_t round_to_int(float a) {
  if (std::isnan(a)) return 0;
  const float r = rintf(a);
  return r >= 0x1p31f ? INT32_MAX : r < -0x1p31f ? INT32_MIN : int32_t(r);
}
inline float to_float(int32_t a) { return float(a); }
inline float exp2_approx(float a) { return exp2f(a); }

inline float to_float(float a) { return a; }
inline float to_float(half_t a) { return float(bits_as<_Float16>(a.bits)); }
inline float to_float(bfloat_t a) { return __uint_as_float(uint32_t(a.bits) << 16); }

template <class T>
T from_float(float a) {
  return a;
}
template <>
inline half_t from_float<half_t>(float a) {
  return {bits_as<uint16_t>(_Float16(a))};
}
template <>
inline bfloat_t from_float<bfloat_t>(float a) {
  if (std::isnan(a)) return {0x7fff};
  const uint32_t bits = __float_as_uint(a);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <class T>
uint32_t pack_pair(float low, float high) {
  return uint32_t(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

struct alignas(16) Words4 {
  uint32_t x[4];
};
inline Words4 load_streaming(const void* p) {
  if (uintptr_t(p) % 16) emulated::fail("16 bytes at %p, not on their boundary", p);
  return *static_cast<const Words4*>(p);
}

inline void named_barrier_sync(int barrier, int threads) {
  emulated::barrier_sync(barrier, threads);
}
inline void named_barrier_arrive(int barrier, int threads) {
  emulated::barrier_arrive(barrier, threads);
}
