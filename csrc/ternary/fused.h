// Products of a few rows straight from the packed bytes: each byte is loaded once for up to R rows,
// its codes live in registers only.  Nothing but q and the sums goes through L1 beside the stream.
//
// A kernel file gives the vectors V (base/bytes256.h, bytes512.h) and their dot product D:
//
//   D::dot(a, c, x)   a += four (u8 code c) x (s8 x) a lane, in whatever lanes a sum has
//   D::widen(a)       the int32 lanes of such a sum
//   D::narrow         whether a sum is exact for kNarrowQuads dots only
#pragma once
#include <immintrin.h>

#include "ternary/blocked.h"

namespace bitnet {
namespace {

constexpr int kNarrowQuads = 64;
constexpr int kWideQuads = 128;  // of a chunk, 8 KB of packed bytes, where it need not be fewer

// Sums in int32 lanes from the start.
template <class V>
struct WideDot {
  using T = typename V::type;
  static constexpr bool narrow = false;
  static BITNET_INLINE void dot(T& a, T codes, T x) { a = V::dot(a, codes, x); }
  static BITNET_INLINE T widen(T a) { return a; }
};

// What takes the codes of k-quad t out of packed bytes, t ascending.
template <class V>
struct Fields {
  static constexpr int quads = 4;
  static BITNET_INLINE typename V::type start(typename V::type v) { return v; }
  template <int>
  static BITNET_INLINE typename V::type take(typename V::type& v) {
    const auto code = V::bit_and(v, V::set1(3));
    v = V::template shift<2>(v);
    return code;
  }
};

// A byte r is a fraction r / 256 in base 3: its next digit is floor(3 r / 256) = (r > 85) +
// (r > 170), and 3 r mod 256 stays.  V may hold r less a constant that tripling keeps.
template <class V>
struct Digits {
  static constexpr int quads = 5;
  static BITNET_INLINE typename V::type start(typename V::type v) { return V::fractions(v); }
  template <int>
  static BITNET_INLINE typename V::type take(typename V::type& v) {
    const auto code = V::digit(v);
    v = V::add8(v, V::add8(v, v));
    return code;
  }
};

// Vectors of outputs that a number of rows takes at a time: their sums leave registers to packed
// bytes, codes and a quad of q.
template <class V>
constexpr int fused_parts(int rows) {
  int parts = 4;
  while (parts > 1 && rows * parts > V::sums) parts /= 2;
  return parts;
}

// acc[r][0..63] = sum q c of one panel, r < R.
template <class V, class D, class Codes, int R>
void fused(const uint8_t* packed, int64_t blocks, int64_t ahead, const int8_t* q, int64_t q_stride,
           int32_t* acc) {
  using T = typename V::type;
  constexpr int P = fused_parts<V>(R), lanes = V::bytes / 4;
  // All parts of a chunk of blocks come from L1 after the first.
  constexpr bool whole = P * V::bytes == kBlockBytes && !D::narrow;
  const int64_t chunk = whole ? blocks : (D::narrow ? kNarrowQuads : kWideQuads) / Codes::quads;
  for (int64_t b = 0; b < blocks; b += chunk) {
    const int64_t end = blocks - b < chunk ? blocks : b + chunk;
    for (int from = 0; from < kBlockBytes; from += P * V::bytes) {
      T a[R][P];
      each<R>([&]<int r>()
                  BITNET_LAMBDA { each<P>([&]<int h>() BITNET_LAMBDA { a[r][h] = V::zero(); }); });
      const uint8_t* p = packed + b * kBlockBytes + from;
      const int8_t* x = q + b * 4 * Codes::quads;
      for (int64_t i = b; i < end; ++i, p += kBlockBytes, x += 4 * Codes::quads) {
        T v[P];
        each<P>([&]<int h>() BITNET_LAMBDA {
          if (h * V::bytes % BITNET_LINE == 0)
            _mm_prefetch(reinterpret_cast<const char*>(p) + ahead + h * V::bytes, _MM_HINT_T0);
          v[h] = Codes::start(V::load(p + h * V::bytes));
        });
        each<Codes::quads>([&]<int t>() BITNET_LAMBDA {
          T c[P];
          each<P>([&]<int h>() BITNET_LAMBDA { c[h] = Codes::template take<t>(v[h]); });
          each<R>([&]<int r>() BITNET_LAMBDA {
            const T quad = V::set1_int(quad_at(x + r * q_stride + 4 * t));
            each<P>([&]<int h>() BITNET_LAMBDA { D::dot(a[r][h], c[h], quad); });
          });
        });
      }
      each<R>([&]<int r>() BITNET_LAMBDA {
        each<P>([&]<int h>() BITNET_LAMBDA {
          int32_t* to = acc + r * kPanel + from / 4 + h * lanes;
          const T wide = D::widen(a[r][h]);
          V::store(to, b == 0 ? wide : V::add32(V::load(to), wide));
        });
      });
    }
  }
}

}  // namespace
}  // namespace bitnet
