// Arithmetic and conversions that mean one machine instruction, whatever the compiler's options.
//
// The float functions here are IEEE: round to nearest even, subnormals kept, nothing contracted,
// also where somebody compiles with -ftz=true, as CuPy's RawModule does. They are the arithmetic of
// kernels whose results must have the CPU's bits.
//
// The tests have a header of the same name and functions for the host's compiler.
#pragma once

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;

// Numbers as memory holds them; arithmetic is in float.
struct half_t {
  uint16_t bits;
};
struct bfloat_t {
  uint16_t bits;
};

#define INLINE __device__ __forceinline__

// The block's dynamic shared memory, on a boundary of 1024 bytes (the period of swizzles).
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

#define INFINITY_F __int_as_float(0x7f800000)

// ---- float32, IEEE

INLINE float add_rn(float a, float b) {
  float c;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

INLINE float sub_rn(float a, float b) {
  float c;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

INLINE float mul_rn(float a, float b) {
  float c;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// a * b + c, rounded once.
INLINE float fma_rn(float a, float b, float c) {
  float d;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

INLINE float div_rn(float a, float b) {
  float c;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

INLINE float sqrt_rn(float a) {
  float b;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(b) : "f"(a));
  return b;
}

// The number where one of the two is NaN.
INLINE float max_num(float a, float b) {
  float c;
  asm("max.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

INLINE float min_num(float a, float b) {
  float c;
  asm("min.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// |a|, by its bits.
INLINE float magnitude(float a) { return __int_as_float(__float_as_int(a) & 0x7fffffff); }

// a, any NaN as the one quiet NaN.
INLINE float one_nan(float a) { return a == a ? a : __int_as_float(0x7fc00000); }

// Nearest integer, ties to even; NaN is 0, and what does not fit is the nearest that does.
INLINE int32_t round_to_int(float a) {
  int32_t b;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(b) : "f"(a));
  return b;
}

INLINE float to_float(int32_t a) {
  float b;
  asm("cvt.rn.f32.s32 %0, %1;" : "=f"(b) : "r"(a));
  return b;
}

// 2^a within 2 units in the last place, subnormals flushed: for softmax, not for equal bits.
INLINE float exp2_approx(float a) {
  float b;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(b) : "f"(a));
  return b;
}

// ---- half and bfloat16

INLINE float to_float(float a) { return a; }

INLINE float to_float(half_t a) {
  float b;
  asm("cvt.f32.f16 %0, %1;" : "=f"(b) : "h"(a.bits));
  return b;
}

INLINE float to_float(bfloat_t a) { return __uint_as_float(uint32_t(a.bits) << 16); }

// Rounded to nearest even.
template <class T>
INLINE T from_float(float a);

template <>
INLINE float from_float<float>(float a) {
  return a;
}

template <>
INLINE half_t from_float<half_t>(float a) {
  half_t b;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b.bits) : "f"(a));
  return b;
}

template <>
INLINE bfloat_t from_float<bfloat_t>(float a) {
  bfloat_t b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(a));
  return b;
}

// Two rounded numbers in a word, `low` in the low half.
template <class T>
INLINE uint32_t pack_pair(float low, float high);

template <>
INLINE uint32_t pack_pair<half_t>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
INLINE uint32_t pack_pair<bfloat_t>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---- memory

struct alignas(16) Words4 {
  uint32_t x[4];
};

// 16 bytes that are read once: not kept in L1.
INLINE Words4 load_streaming(const void* p) {
  Words4 w;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x[0]), "=r"(w.x[1]), "=r"(w.x[2]), "=r"(w.x[3])
               : "l"(p));
  return w;
}

// ---- barriers of some of a block's warps; 0 is __syncthreads'

INLINE void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

INLINE void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
