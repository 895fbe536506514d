// CUDA's keywords, built-in variables and functions over fibers.h, and what emulator.py calls.
#pragma once
#include <signal.h>
#include <unistd.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __constant__ static const
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__
#define __CUDA_ARCH__ EMULATED_ARCH

#define threadIdx (emulated::self().index)
#define blockIdx (emulated::machine.block_index)
#define blockDim (emulated::machine.block)
#define gridDim (emulated::machine.grid)
constexpr int warpSize = 32;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- barriers

inline void __syncthreads() { emulated::barrier_sync(0, 0); }
inline int __syncthreads_or(int p) { return emulated::barrier_sync(0, 0, p).total[1] > 0; }
inline int __syncthreads_and(int p) { return emulated::barrier_sync(0, 0, p).total[0] == 0; }
inline int __syncthreads_count(int p) { return emulated::barrier_sync(0, 0, p).total[1]; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- the lanes of a warp

namespace emulated {

template <class T, class Source>
T shuffle(uint32_t mask, const char* what, T value, int lane_argument, int width, Source source) {
  struct Operands {
    T value, result;
    int argument;
  } mine{value, value, lane_argument};
  together(warp(), lane(), mask, what, mine, [&](Operands** lanes) {
    for (int i = 0; i < kWarp; ++i) {
      if (!lanes[i]) continue;
      const int base = i / width * width, from = source(i - base, lanes[i]->argument);
      if (from < 0 || from >= width) continue;
      if (!lanes[base + from])
        fail("%s: lane %d reads lane %d, not in %08x", what, i, base + from, mask);
      lanes[i]->result = lanes[base + from]->value;
    }
  });
  return mine.result;
}

template <class T, class Compute>
T vote(uint32_t mask, const char* what, T value, Compute compute) {
  T mine = value;
  together(warp(), lane(), mask, what, mine, [&](T** lanes) {
    const T result = compute(lanes);
    for (int i = 0; i < kWarp; ++i)
      if (lanes[i]) *lanes[i] = result;
  });
  return mine;
}

inline uint32_t ballot(uint32_t mask, const char* what, int predicate) {
  return vote(mask, what, uint32_t(predicate != 0), [](uint32_t** lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarp; ++i) bits |= uint32_t(lanes[i] && *lanes[i]) << i;
    return bits;
  });
}

template <class T, class Op>
T reduce(uint32_t mask, const char* what, T value, Op op) {
  return vote(mask, what, value, [&](T** lanes) {
    T* total = nullptr;
    for (int i = 0; i < kWarp; ++i)
      if (lanes[i]) {
        if (total)
          *total = op(*total, *lanes[i]);
        else
          total = lanes[i];
      }
    return *total;
  });
}

}  // namespace emulated

template <class T>
T __shfl_sync(uint32_t mask, T v, int from, int width = 32) {
  return emulated::shuffle(mask, "__shfl_sync", v, from, width,
                           [width](int, int a) { return a & (width - 1); });
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int bits, int width = 32) {
  return emulated::shuffle(mask, "__shfl_xor_sync", v, bits, width,
                           [](int i, int a) { return i ^ a; });
}
template <class T>
T __shfl_down_sync(uint32_t mask, T v, int by, int width = 32) {
  return emulated::shuffle(mask, "__shfl_down_sync", v, by, width,
                           [](int i, int a) { return i + a; });
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, int by, int width = 32) {
  return emulated::shuffle(mask, "__shfl_up_sync", v, by, width,
                           [](int i, int a) { return i - a; });
}
inline uint32_t __ballot_sync(uint32_t mask, int p) {
  return emulated::ballot(mask, "__ballot_sync", p);
}
inline int __any_sync(uint32_t mask, int p) { return emulated::ballot(mask, "__any_sync", p) != 0; }
inline int __all_sync(uint32_t mask, int p) {
  return emulated::ballot(mask, "__all_sync", p) == mask;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu) { emulated::ballot(mask, "__syncwarp", 0); }
inline int __reduce_add_sync(uint32_t mask, int v) {
  return int(emulated::reduce(mask, "__reduce_add_sync", uint32_t(v),
                              [](uint32_t a, uint32_t b) { return a + b; }));
}
template <class T>
T __reduce_max_sync(uint32_t mask, T v) {
  return emulated::reduce(mask, "__reduce_max_sync", v, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(uint32_t mask, T v) {
  return emulated::reduce(mask, "__reduce_min_sync", v, [](T a, T b) { return a < b ? a : b; });
}

// ---- atomics: fibers change only where they wait

template <class T>
T atomicExch(T* p, T v) {
  return std::exchange(*p, v);
}
template <class T>
T atomicAdd(T* p, T v) {
  return std::exchange(*p, T(*p + v));
}
template <class T>
T atomicMax(T* p, T v) {
  return std::exchange(*p, *p > v ? *p : v);
}
template <class T>
T atomicMin(T* p, T v) {
  return std::exchange(*p, *p < v ? *p : v);
}
template <class T>
T atomicCAS(T* p, T compare, T v) {
  return std::exchange(*p, *p == compare ? v : *p);
}

// ---- bits and bytes

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __int_as_float(int32_t a) { return bits_as<float>(a); }
inline int32_t __float_as_int(float a) { return bits_as<int32_t>(a); }
inline float __uint_as_float(uint32_t a) { return bits_as<float>(a); }
inline uint32_t __float_as_uint(float a) { return bits_as<uint32_t>(a); }
inline double __longlong_as_double(int64_t a) { return bits_as<double>(a); }
inline int64_t __double_as_longlong(double a) { return bits_as<int64_t>(a); }
inline int __popc(uint32_t a) { return __builtin_popcount(a); }
inline int __clz(int32_t a) { return a ? __builtin_clz(uint32_t(a)) : 32; }
inline int __ffs(int32_t a) { return __builtin_ffs(a); }
inline uint32_t __brev(uint32_t a) {
  uint32_t b = 0;
  for (int i = 0; i < 32; ++i) b |= (a >> i & 1) << (31 - i);
  return b;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t c = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> 4 * i & 15, byte = uint32_t(bytes >> 8 * (s & 7)) & 255;
    c |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return c;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) >> (by & 31));
}
template <class T>
T __ldg(const T* p) {
  return *p;
}

// The sum of four products of bytes, and c; signed by the types of a and b.
template <class A, class B>
int32_t dot4(A a, B b, int32_t c) {
  uint32_t sum = uint32_t(c);
  for (int i = 0; i < 4; ++i) {
    const auto byte = [i](auto w) {
      const int u = int(uint32_t(w) >> 8 * i & 255);
      return std::is_signed_v<decltype(w)> ? int(int8_t(u)) : u;
    };
    sum += uint32_t(byte(a) * byte(b));
  }
  return int32_t(sum);
}
inline int32_t __dp4a(int32_t a, int32_t b, int32_t c) { return dot4(a, b, c); }
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
  return uint32_t(dot4(a, b, int32_t(c)));
}

template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}

// ---- kernels by name, and memory that ends where it says

namespace emulated {

struct Parameter {
  char kind;      // p pointer, i integer, f float
  uint8_t bytes;  // of the number, or of what is pointed to
};

template <class P>
constexpr Parameter parameter_of() {
  if constexpr (std::is_pointer_v<P>) {
    using To = std::remove_pointer_t<P>;
    if constexpr (std::is_void_v<To>)
      return {'p', 0};
    else
      return {'p', uint8_t(sizeof(To))};
  } else {
    return {std::is_floating_point_v<P> ? 'f' : 'i', uint8_t(sizeof(P))};
  }
}

struct Kernel {
  const char* name;
  std::vector<Parameter> parameters;
  std::function<void(void* const* args)> call;
};

template <class... P>
Kernel kernel_of(const char* name, void (*kernel)(P...)) {
  return {name, {parameter_of<std::remove_cv_t<P>>()...}, [kernel](void* const* args) {
            [&]<size_t... I>(std::index_sequence<I...>) {
              kernel(*static_cast<P*>(args[I])...);
            }(std::index_sequence_for<P...>());
          }};
}

extern const std::vector<Kernel> kernels;  // defined after the source under test

inline void on_fault(int, siginfo_t* info, void*) {
  fail("access outside of every array, at %p", info->si_addr);
}

}  // namespace emulated

extern "C" {

// "name p4 p2 i4 f4" of kernel i; null past the last.
const char* emulated_kernel(int i) {
  static std::string text;
  if (i >= int(emulated::kernels.size())) return nullptr;
  text = emulated::kernels[i].name;
  for (const auto& p : emulated::kernels[i].parameters)
    text += std::string("\t") + p.kind + std::to_string(p.bytes);
  return text.c_str();
}

// Empty, or the error.
const char* emulated_launch(int kernel, const uint32_t* grid, const uint32_t* block, size_t shared,
                            bool descending, void* const* args) {
  const emulated::Kernel& k = emulated::kernels[kernel];
  struct sigaction action = {}, before;
  action.sa_sigaction = emulated::on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before);
  const char* error =
      emulated::run_grid(k.name, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                         shared, descending, [&k, args] { k.call(args); });
  sigaction(SIGSEGV, &before, nullptr);
  return error;
}
}
