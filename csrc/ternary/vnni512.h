// Ternary kernels on 512-bit vpdpbusd: acc[j] += sum of 4 (u8 code x s8 q), no saturation.
// Those of avx512vnni.cpp; amx_int8.cpp takes them for few rows and for what fills no tile.
#pragma once
#include <immintrin.h>

#include "base/bytes512.h"
#include "base/lanes_avx512.h"
#include "ternary/fused.h"

namespace bitnet {
namespace {

BITNET_INLINE __m512i broadcast(const int8_t* q) { return _mm512_set1_epi32(quad_at(q)); }

// One k-quad of six rows: sums zmm0-23 (row r, strip s: zmm 4r + s), codes zmm24-27, a quad of each
// row of q broadcast in zmm28-31 by turns.  10 loads feed 24 vpdpbusd.
#define DOT4(x, a, b, c, d)               \
  "vpdpbusd %%zmm" x ", %%zmm24, %%zmm" a \
  "\n\t"                                  \
  "vpdpbusd %%zmm" x ", %%zmm25, %%zmm" b \
  "\n\t"                                  \
  "vpdpbusd %%zmm" x ", %%zmm26, %%zmm" c \
  "\n\t"                                  \
  "vpdpbusd %%zmm" x ", %%zmm27, %%zmm" d "\n\t"
#define QUAD(at, c0, c1, c2, c3)                                                              \
  "vmovdqa64 " c0                                                                             \
  "(%[codes]), %%zmm24\n\t"                                                                   \
  "vmovdqa64 " c1                                                                             \
  "(%[codes]), %%zmm25\n\t"                                                                   \
  "vmovdqa64 " c2                                                                             \
  "(%[codes]), %%zmm26\n\t"                                                                   \
  "vmovdqa64 " c3                                                                             \
  "(%[codes]), %%zmm27\n\t"                                                                   \
  "vpbroadcastd " at                                                                          \
  "(%[q]), %%zmm28\n\t"                                                                       \
  "vpbroadcastd " at                                                                          \
  "(%[q],%[stride]), %%zmm29\n\t"                                                             \
  "vpbroadcastd " at                                                                          \
  "(%[q],%[stride],2), %%zmm30\n\t"                                                           \
  "vpbroadcastd " at "(%[q3]), %%zmm31\n\t" DOT4(                                             \
      "28", "0", "1", "2",                                                                    \
      "3") "vpbroadcastd " at                                                                 \
           "(%[q3],%[stride]), %%zmm28\n\t" DOT4(                                             \
               "29", "4", "5", "6",                                                           \
               "7") "vpbroadcastd " at                                                        \
                    "(%[q3],%[stride],2), %%zmm29\n\t" DOT4("30", "8", "9", "10", "11")       \
                        DOT4("31", "12", "13", "14", "15") DOT4("28", "16", "17", "18", "19") \
                            DOT4("29", "20", "21", "22", "23")
#define FOUR(f, base, a, b, c, d) \
  f(a, base "+0") f(b, base "+64") f(c, base "+128") f(d, base "+192")
#define EVERY_SUM(f)                      \
  FOUR(f, "0", "0", "1", "2", "3")        \
  FOUR(f, "256", "4", "5", "6", "7")      \
  FOUR(f, "512", "8", "9", "10", "11")    \
  FOUR(f, "768", "12", "13", "14", "15")  \
  FOUR(f, "1024", "16", "17", "18", "19") \
  FOUR(f, "1280", "20", "21", "22", "23")
#define CLEAR(z, at) "vpxord %%zmm" z ", %%zmm" z ", %%zmm" z "\n\t"
#define LOAD(z, at) "vmovdqa64 " at "(%[acc]), %%zmm" z "\n\t"
#define STORE(z, at) "vmovdqa64 %%zmm" z ", " at "(%[acc])\n\t"

// 6 rows x 64 outputs.  In assembly because GCC 12 keeps 24 sums of intrinsics on the stack.  codes
// and acc are aligned to 64 bytes, quads > 0.
void tile6(const uint8_t* codes, int64_t quads, const int8_t* q, int64_t q_stride, bool fresh,
           int32_t* acc) {
  const int8_t* q3 = q + 3 * q_stride;
  int64_t groups = quads / 4, rest = quads % 4;
  __asm__ volatile(
      "test %[fresh], %[fresh]\n\t"
      "jz 1f\n\t" EVERY_SUM(CLEAR)
      "jmp 2f\n"
      "1:\n\t" EVERY_SUM(LOAD)
      "2:\n\t"
      "test %[groups], %[groups]\n\t"
      "jz 4f\n\t"
      ".p2align 5\n"
      "3:\n\t" QUAD("0", "0", "64", "128", "192") QUAD("4", "256", "320", "384", "448")
          QUAD("8", "512", "576", "640", "704") QUAD("12", "768", "832", "896", "960")
      "add $1024, %[codes]\n\t"
      "add $16, %[q]\n\t"
      "add $16, %[q3]\n\t"
      "dec %[groups]\n\t"
      "jnz 3b\n"
      "4:\n\t"
      "test %[rest], %[rest]\n\t"
      "jz 6f\n"
      "5:\n\t" QUAD("0", "0", "64", "128", "192")
      "add $256, %[codes]\n\t"
      "add $4, %[q]\n\t"
      "add $4, %[q3]\n\t"
      "dec %[rest]\n\t"
      "jnz 5b\n"
      "6:\n\t" EVERY_SUM(STORE)
      : [codes] "+r"(codes), [q] "+r"(q), [q3] "+r"(q3), [groups] "+r"(groups), [rest] "+r"(rest)
      : [stride] "r"(q_stride), [acc] "r"(acc), [fresh] "r"(int(fresh))
      : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
        "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",
        "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",
        "xmm29", "xmm30", "xmm31");
}

// The digits of fused.h's Digits, 64 times too large.  With v a byte and n = 3 v - 256 c the next
// one, the mean of v and n is 2 (v - 64 c), and half of that taken from v leaves 64 c, exactly.
// The last digit has a third of the bytes to itself, v in 0..80, 86..166 or 171..251, where 3 v / 4
// with both halvings rounded up has 64 c in its upper two bits.
struct ScaledDigits {
  static constexpr int quads = 5;
  static BITNET_INLINE __m512i start(__m512i v) { return v; }
  template <int t>
  static BITNET_INLINE __m512i take(__m512i& v) {
    const __m512i zero = _mm512_setzero_si512();
    if constexpr (t == quads - 1) {
      const __m512i most = _mm512_avg_epu8(v, _mm512_avg_epu8(v, zero));
      return _mm512_and_si512(most, _mm512_set1_epi8(char(0xc0)));
    }
    const __m512i next = _mm512_add_epi8(v, _mm512_add_epi8(v, v));
    const __m512i rest = _mm512_avg_epu8(_mm512_avg_epu8(v, next), zero);
    const __m512i code = _mm512_sub_epi8(v, rest);
    v = next;
    return code;
  }
};

// |sum| <= 64 * 2 * 128 * k < 2^31 (the caller sees to k < 32768).
struct ScaledDot : WideDot<Bytes512> {
  static BITNET_INLINE __m512i widen(__m512i a) { return _mm512_srai_epi32(a, 6); }
};

struct Vnni512 {
  static constexpr int rows = 6, gemv_rows = 48, gemv_group = 11, gemv_group5 = 8, step = 320;
  static constexpr bool dense = true;
  using V = Bytes512;

  // R rows x 64 outputs: 4 R sums, 4 codes, 1 quad of q in the 32 registers; GCC 12 manages four
  // rows.
  template <int R>
  static void tile(const uint8_t* codes, int64_t quads, const int8_t* q, int64_t q_stride,
                   bool fresh, int32_t* acc) {
    if constexpr (R == 6) {
      tile6(codes, quads, q, q_stride, fresh, acc);
    } else if constexpr (R == 5) {
      tile<3>(codes, quads, q, q_stride, fresh, acc);
      tile<2>(codes, quads, q + 3 * q_stride, q_stride, fresh, acc + 3 * kPanel);
    } else {
      few<R>(codes, quads, q, q_stride, fresh, acc);
    }
  }

  template <int R>
  static BITNET_INLINE void few(const uint8_t* codes, int64_t quads, const int8_t* q,
                                int64_t q_stride, bool fresh, int32_t* acc) {
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

  static void gemv2(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q,
                    int64_t q_stride, int n, int32_t* acc) {
    with_count<gemv_group>(n, [&]<int R> {
      fused<V, WideDot<V>, Fields<V>, R>(packed, blocks, ahead, q, q_stride, acc);
    });
  }

  // No digit is extracted: with r0 = byte, r(t+1) = 3 r(t) mod 256 the digit of quad t is
  // (3 r(t) - r(t+1)) / 256, so sum c q = (3 sum r(t) q - sum r(t+1) q) / 256.  The sums wrap, the
  // result is exact while 256 * 2 * 128 * k < 2^31 (the caller sees to k < 32768).
  static void row5(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q,
                   int32_t* acc) {
    __m512i a[4], c[4];
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) a[s] = c[s] = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; ++b, packed += kBlockBytes, q += 20) {
      __m512i v[4];
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        _mm_prefetch(reinterpret_cast<const char*>(packed) + ahead + 64 * s, _MM_HINT_T0);
        v[s] = _mm512_loadu_si512(packed + 64 * s);
      }
#pragma GCC unroll 5
      for (int t = 0; t < 5; ++t) {
        const __m512i x = broadcast(q + 4 * t);
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          const __m512i next = _mm512_add_epi8(v[s], _mm512_add_epi8(v[s], v[s]));
          a[s] = _mm512_dpbusd_epi32(a[s], v[s], x);
          c[s] = _mm512_dpbusd_epi32(c[s], next, x);
          v[s] = next;
        }
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const __m512i triple = _mm512_add_epi32(a[s], _mm512_add_epi32(a[s], a[s]));
      _mm512_storeu_si512(acc + 16 * s, _mm512_srai_epi32(_mm512_sub_epi32(triple, c[s]), 8));
    }
  }

  // Five or six rows: all their sums, the four v, one code and its quad in memory are 32 registers,
  // but GCC keeps that order of itself for none.
  template <int R>
  static void digits5(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q,
                      int64_t q_stride, int32_t* acc) {
    __m512i a[R][4], v[4];
    each<R>([&]<int r>() BITNET_LAMBDA {
      each<4>([&]<int s>() BITNET_LAMBDA { a[r][s] = _mm512_setzero_si512(); });
    });
    for (int64_t b = 0; b < blocks; ++b, packed += kBlockBytes, q += 20) {
      each<4>([&]<int s>() BITNET_LAMBDA {
        _mm_prefetch(reinterpret_cast<const char*>(packed) + ahead + 64 * s, _MM_HINT_T0);
        v[s] = _mm512_loadu_si512(packed + 64 * s);
      });
      each<5>([&]<int t>() BITNET_LAMBDA {
        each<4>([&]<int s>() BITNET_LAMBDA {
          const __m512i code = ScaledDigits::take<t>(v[s]);
          each<R>([&]<int r>() BITNET_LAMBDA {
            const int8_t (*quad)[4] =
                reinterpret_cast<const int8_t (*)[4]>(q + r * q_stride + 4 * t);
            __asm__ volatile("vpdpbusd %2%{1to16%}, %1, %0"
                             : "+v"(a[r][s])
                             : "v"(code), "m"(*quad));
          });
        });
      });
    }
    each<R>([&]<int r>() BITNET_LAMBDA {
      each<4>([&]<int s>() BITNET_LAMBDA {
        _mm512_storeu_si512(acc + r * kPanel + 16 * s, ScaledDot::widen(a[r][s]));
      });
    });
  }

  static void gemv5(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q,
                    int64_t q_stride, int n, int32_t* acc) {
    with_count<gemv_group5>(n, [&]<int R> {
      // Seven and eight have no registers for all outputs at once: fused takes half at a time.
      if constexpr (R == 1)
        row5(packed, blocks, ahead, q, acc);
      else if constexpr (R == 5 || R == 6)
        digits5<R>(packed, blocks, ahead, q, q_stride, acc);
      else
        fused<V, ScaledDot, ScaledDigits, R>(packed, blocks, ahead, q, q_stride, acc);
    });
  }
};

}  // namespace
}  // namespace bitnet
