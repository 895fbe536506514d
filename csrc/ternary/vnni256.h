// Ternary kernels on 256-bit vpdpbusd: acc[j] += sum of 4 (u8 code x s8 q), no saturation.
// avxvnni.cpp compiles it to VEX (AVX-VNNI), avxvnni_evex.cpp to EVEX (AVX-512 VNNI and VL).
#pragma once
#include <immintrin.h>

#include "base/bytes256.h"
#include "base/lanes_avx2.h"
#include "ternary/fused.h"

namespace bitnet {
namespace {

struct Vnni256 {
  static constexpr int rows = 6, gemv_rows = 24, gemv_group = 8, gemv_group5 = gemv_group,
                       step = 320;
  static constexpr bool dense = false;
  using V = Bytes256;
  static BITNET_INLINE __m256i broadcast(const int8_t* q) { return V::set1_int(quad_at(q)); }

  // R rows x 16 outputs at a time: 2 R sums, 2 codes, 1 quad of q in the 16 registers.
  template <int R>
  static void tile(const uint8_t* codes, int64_t quads, const int8_t* q, int64_t q_stride,
                   bool fresh, int32_t* acc) {
    for (int strip = 0; strip < 4; ++strip) {
      __m256i a[R][2];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
          a[r][h] = fresh ? V::zero() : V::load(acc + r * kPanel + strip * 16 + h * 8);
      const uint8_t* c = codes + strip * 64;
#pragma GCC unroll 2
      for (int64_t t = 0; t < quads; ++t, c += kBlockBytes) {
        const __m256i c0 = V::load(c), c1 = V::load(c + 32);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const __m256i x = broadcast(q + r * q_stride + 4 * t);
          a[r][0] = V::dot(a[r][0], c0, x);
          a[r][1] = V::dot(a[r][1], c1, x);
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) V::store(acc + r * kPanel + strip * 16 + h * 8, a[r][h]);
    }
  }

  static void gemv2(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q,
                    int64_t q_stride, int n, int32_t* acc) {
    with_count<gemv_group>(n, [&]<int R> {
      if constexpr (R == 1)
        one2(packed, blocks, ahead, q, acc);
      else
        fused<V, WideDot<V>, Fields<V>, R>(packed, blocks, ahead, q, q_stride, acc);
    });
  }

  static void gemv5(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q,
                    int64_t q_stride, int n, int32_t* acc) {
    with_count<gemv_group>(n, [&]<int R> {
      if constexpr (R == 1)
        one5(packed, blocks, ahead, q, acc);
      else
        fused<V, WideDot<V>, Digits<V>, R>(packed, blocks, ahead, q, q_stride, acc);
    });
  }

  static void one2(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q,
                   int32_t* acc) {
    const __m256i three = _mm256_set1_epi8(3);
    __m256i a[8];
#pragma GCC unroll 8
    for (int h = 0; h < 8; ++h) a[h] = V::zero();
    for (int64_t b = 0; b < blocks; ++b, packed += kBlockBytes, q += 16) {
      const __m256i x0 = broadcast(q), x1 = broadcast(q + 4), x2 = broadcast(q + 8),
                    x3 = broadcast(q + 12);
#pragma GCC unroll 8
      for (int h = 0; h < 8; ++h) {
        if (h % 2 == 0)
          _mm_prefetch(reinterpret_cast<const char*>(packed) + ahead + 32 * h, _MM_HINT_T0);
        const __m256i v = V::load(packed + 32 * h);
        a[h] = V::dot(a[h], _mm256_and_si256(v, three), x0);
        a[h] = V::dot(a[h], _mm256_and_si256(_mm256_srli_epi16(v, 2), three), x1);
        a[h] = V::dot(a[h], _mm256_and_si256(_mm256_srli_epi16(v, 4), three), x2);
        a[h] = V::dot(a[h], _mm256_and_si256(_mm256_srli_epi16(v, 6), three), x3);
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < 8; ++h) V::store(acc + 8 * h, a[h]);
  }

  // No digit is extracted: with r0 = byte, r(t+1) = 3 r(t) mod 256 the digit of quad t is
  // (3 r(t) - r(t+1)) / 256, so sum c q = (3 sum r(t) q - sum r(t+1) q) / 256.  The sums wrap, the
  // result is exact while 256 * 2 * 128 * k < 2^31 (the caller sees to k < 32768).  Two strips at a
  // time: their sums are 8 registers; 16 blocks stay in L1 for the other two.
  static void one5(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q,
                   int32_t* acc) {
    alignas(32) int32_t low[kPanel] = {}, high[kPanel] = {};
    for (int64_t b = 0; b < blocks; b += 16) {
      const int64_t end = blocks - b < 16 ? blocks : b + 16;
      for (int half = 0; half < 2; ++half) {
        int32_t *lo = low + 32 * half, *hi = high + 32 * half;
        __m256i a[4], c[4];
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h) a[h] = V::load(lo + 8 * h), c[h] = V::load(hi + 8 * h);
        for (int64_t i = b; i < end; ++i) {
          const uint8_t* p = packed + i * kBlockBytes + 128 * half;
          _mm_prefetch(reinterpret_cast<const char*>(p) + 2 * ahead, _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(p) + 2 * ahead + 64, _MM_HINT_T0);
          __m256i r[4];
#pragma GCC unroll 4
          for (int h = 0; h < 4; ++h) r[h] = V::load(p + 32 * h);
#pragma GCC unroll 5
          for (int t = 0; t < 5; ++t) {
            const __m256i x = broadcast(q + 20 * i + 4 * t);
#pragma GCC unroll 4
            for (int h = 0; h < 4; ++h) {
              a[h] = V::dot(a[h], r[h], x);
              r[h] = _mm256_add_epi8(r[h], _mm256_add_epi8(r[h], r[h]));
              c[h] = V::dot(c[h], r[h], x);
            }
          }
        }
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h) V::store(lo + 8 * h, a[h]), V::store(hi + 8 * h, c[h]);
      }
    }
    for (int o = 0; o < kPanel; ++o)
      acc[o] = int32_t(3u * uint32_t(low[o]) - uint32_t(high[o])) >> 8;
  }
};

}  // namespace
}  // namespace bitnet
