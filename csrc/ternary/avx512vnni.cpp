// Ternary kernels on 512-bit vpdpbusd: acc[j] += sum of 4 (u8 code x s8 q), no saturation.
#include <immintrin.h>

#include "ternary/blocked.h"

namespace bitnet {
namespace {

BITNET_INLINE __m512i broadcast(const int8_t* q) {
  int32_t quad;
  __builtin_memcpy(&quad, q, 4);
  return _mm512_set1_epi32(quad);
}

struct Vnni512 {
  static constexpr int rows = 4, gemv_rows = 4;

  // R rows x 64 outputs: 4 R sums, 4 codes, 1 quad of q in the 32 registers.
  template <int R>
  static void tile(const uint8_t* codes, int64_t quads, const int8_t* q, int64_t q_stride,
                   bool fresh, int32_t* acc) {
    __m512i a[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s)
        a[r][s] = fresh ? _mm512_setzero_si512() : _mm512_loadu_si512(acc + r * kPanel + 16 * s);
    for (int64_t t = 0; t < quads; ++t, codes += kBlockBytes, q += 4) {
      const __m512i c0 = _mm512_loadu_si512(codes), c1 = _mm512_loadu_si512(codes + 64),
                    c2 = _mm512_loadu_si512(codes + 128), c3 = _mm512_loadu_si512(codes + 192);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i x = broadcast(q + r * q_stride);
        a[r][0] = _mm512_dpbusd_epi32(a[r][0], c0, x);
        a[r][1] = _mm512_dpbusd_epi32(a[r][1], c1, x);
        a[r][2] = _mm512_dpbusd_epi32(a[r][2], c2, x);
        a[r][3] = _mm512_dpbusd_epi32(a[r][3], c3, x);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) _mm512_storeu_si512(acc + r * kPanel + 16 * s, a[r][s]);
  }

  static void micro(const uint8_t* codes, int64_t quads, const int8_t* q, int64_t q_stride, int n,
                    bool fresh, int32_t* acc) {
    switch (n) {
      case 1:
        return tile<1>(codes, quads, q, q_stride, fresh, acc);
      case 2:
        return tile<2>(codes, quads, q, q_stride, fresh, acc);
      case 3:
        return tile<3>(codes, quads, q, q_stride, fresh, acc);
      default:
        return tile<4>(codes, quads, q, q_stride, fresh, acc);
    }
  }

  template <int R>
  static void rows2(const uint8_t* packed, int64_t blocks, const int8_t* q, int64_t q_stride,
                    int32_t* acc) {
    const __m512i three = _mm512_set1_epi8(3);
    __m512i a[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) a[r][s] = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; ++b, packed += kBlockBytes, q += 16) {
      __m512i v[4];
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        _mm_prefetch(reinterpret_cast<const char*>(packed) + 4096 + 64 * s, _MM_HINT_T0);
        v[s] = _mm512_loadu_si512(packed + 64 * s);
      }
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        __m512i c[4];
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s)
          c[s] = _mm512_and_si512(_mm512_srli_epi16(v[s], unsigned(2 * t)), three);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m512i x = broadcast(q + r * q_stride + 4 * t);
#pragma GCC unroll 4
          for (int s = 0; s < 4; ++s) a[r][s] = _mm512_dpbusd_epi32(a[r][s], c[s], x);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) _mm512_storeu_si512(acc + r * kPanel + 16 * s, a[r][s]);
  }

  static void gemv2(const uint8_t* packed, int64_t blocks, const int8_t* q, int64_t q_stride, int n,
                    int32_t* acc) {
    switch (n) {
      case 1:
        return rows2<1>(packed, blocks, q, q_stride, acc);
      case 2:
        return rows2<2>(packed, blocks, q, q_stride, acc);
      case 3:
        return rows2<3>(packed, blocks, q, q_stride, acc);
      default:
        return rows2<4>(packed, blocks, q, q_stride, acc);
    }
  }

  // No digit is extracted: with r0 = byte, r(t+1) = 3 r(t) mod 256 the digit of quad t is
  // (3 r(t) - r(t+1)) / 256, so sum c q = (3 sum r(t) q - sum r(t+1) q) / 256.  The sums wrap, the
  // result is exact while 256 * 2 * 128 * k < 2^31 (the caller sees to k < 32768).
  template <int R>
  static void rows5(const uint8_t* packed, int64_t blocks, const int8_t* q, int64_t q_stride,
                    int32_t* acc) {
    __m512i a[R][4], c[R][4];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) a[r][s] = c[r][s] = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; ++b, packed += kBlockBytes, q += 20) {
      __m512i v[4];
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        _mm_prefetch(reinterpret_cast<const char*>(packed) + 4096 + 64 * s, _MM_HINT_T0);
        v[s] = _mm512_loadu_si512(packed + 64 * s);
      }
#pragma GCC unroll 5
      for (int t = 0; t < 5; ++t) {
        __m512i x[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) x[r] = broadcast(q + r * q_stride + 4 * t);
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          const __m512i next = _mm512_add_epi8(v[s], _mm512_add_epi8(v[s], v[s]));
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) {
            a[r][s] = _mm512_dpbusd_epi32(a[r][s], v[s], x[r]);
            c[r][s] = _mm512_dpbusd_epi32(c[r][s], next, x[r]);
          }
          v[s] = next;
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        const __m512i triple = _mm512_add_epi32(a[r][s], _mm512_add_epi32(a[r][s], a[r][s]));
        _mm512_storeu_si512(acc + r * kPanel + 16 * s,
                            _mm512_srai_epi32(_mm512_sub_epi32(triple, c[r][s]), 8));
      }
  }

  static void gemv5(const uint8_t* packed, int64_t blocks, const int8_t* q, int64_t q_stride, int n,
                    int32_t* acc) {
    for (; n >= 2; n -= 2, q += 2 * q_stride, acc += 2 * kPanel)
      rows5<2>(packed, blocks, q, q_stride, acc);
    if (n) rows5<1>(packed, blocks, q, q_stride, acc);
  }
};

}  // namespace

const TernaryKernels ternary_avx512vnni = table<Vnni512>("avx512vnni");

}  // namespace bitnet
