// Ternary kernels without a 4-way dot product: vpmaddubsw adds pairs of u8 code x s8 q in int16,
// vpmaddwd by ones widens pairs of those to int32.
//
// A pair is at most 2 * 2 * 128 = 512 in magnitude (and only -512 reaches it), so int16 holds 64 of
// them (-32768 .. 32512): sums are widened after at most 64 quads.  V gives the vector type.
#pragma once
#include <immintrin.h>

#include "ternary/fused.h"
#include "ternary/lookup.h"

namespace bitnet {
namespace {

// One product and its sum, in an order that leaves no more than one product in a register.
template <class V>
struct MaddubsDot {
  static constexpr bool narrow = true;
  using T = typename V::type;
  static BITNET_INLINE void dot(T& a, T codes, T q) {
    T pairs;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
            : "+v"(a), "=&v"(pairs)
            : "v"(codes), "v"(q));
  }
  static BITNET_INLINE T widen(T a) { return V::add_pairs(a); }
};

template <class V>
struct Maddubs {
  static constexpr int gemv_rows = V::gemv_rows, gemv_group = V::gemv_group,
                       gemv_group5 = gemv_group;
  static constexpr int lanes = V::bytes / 4;
  using T = typename V::type;

  static void gemv2(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q,
                    int64_t q_stride, int n, int32_t* acc) {
    with_count<gemv_group>(n, [&]<int R> {
      if constexpr (R == 1)
        one2(packed, blocks, ahead, q, acc);
      else
        fused<V, MaddubsDot<V>, Fields<V>, R>(packed, blocks, ahead, q, q_stride, acc);
    });
  }

  static void gemv5(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q,
                    int64_t q_stride, int n, int32_t* acc) {
    with_count<gemv_group>(n, [&]<int R> {
      fused<V, MaddubsDot<V>, Digits<V>, R>(packed, blocks, ahead, q, q_stride, acc);
    });
  }

  static void one2(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q,
                   int32_t* acc) {
    constexpr int n = kBlockBytes / V::bytes;
    const T three = V::set1(3);
    for (int64_t b = 0; b < blocks; b += kNarrowQuads / 4) {
      const int64_t end = blocks - b < kNarrowQuads / 4 ? blocks : b + kNarrowQuads / 4;
      T a[n];
#pragma GCC unroll 8
      for (int h = 0; h < n; ++h) a[h] = V::zero();
      for (int64_t i = b; i < end; ++i) {
        const uint8_t* p = packed + i * kBlockBytes;
        const int8_t* x = q + 16 * i;
        const T x0 = V::set1_int(quad_at(x)), x1 = V::set1_int(quad_at(x + 4)),
                x2 = V::set1_int(quad_at(x + 8)), x3 = V::set1_int(quad_at(x + 12));
#pragma GCC unroll 8
        for (int h = 0; h < n; ++h) {
          if (h * V::bytes % 64 == 0)
            _mm_prefetch(reinterpret_cast<const char*>(p) + ahead + h * V::bytes, _MM_HINT_T0);
          const T v = V::load(p + h * V::bytes);
          // Four pairs: at most 2048.
          const T low = V::add16(V::maddubs(V::bit_and(v, three), x0),
                                 V::maddubs(V::bit_and(V::template shift<2>(v), three), x1));
          const T high = V::add16(V::maddubs(V::bit_and(V::template shift<4>(v), three), x2),
                                  V::maddubs(V::bit_and(V::template shift<6>(v), three), x3));
          a[h] = V::add16(a[h], V::add16(low, high));
        }
      }
#pragma GCC unroll 8
      for (int h = 0; h < n; ++h) {
        const T wide = V::add_pairs(a[h]);
        V::store(acc + h * lanes, b == 0 ? wide : V::add32(V::load(acc + h * lanes), wide));
      }
    }
  }
};

// Few rows by vpmaddubsw, many by lookup.
template <class V>
constexpr TernaryKernels maddubs_table(const char* isa) {
  return {isa,
          V::gemv_rows,
          kTile,
          kLookupPanels,
          kTile,
          kTile,
          false,
          gemv<Maddubs<V>>,
          lookup_gemm<V, Maddubs<V>>,
          int64_t(sizeof(LookupScratch)),
          sum_row};
}

}  // namespace
}  // namespace bitnet
