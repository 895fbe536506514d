#include "base/lanes_avx512.h"
#include "ternary/maddubs.h"

namespace bitnet {
namespace {

struct V512 {
  using type = __m512i;
  static constexpr int bytes = 64, rows = 6, parts = 4;
  static BITNET_INLINE type zero() { return _mm512_setzero_si512(); }
  static BITNET_INLINE type set1(char byte) { return _mm512_set1_epi8(byte); }
  static BITNET_INLINE type load(const void* p) { return _mm512_loadu_si512(p); }
  static BITNET_INLINE void store(void* p, type v) { _mm512_storeu_si512(p, v); }
  static BITNET_INLINE type set1_int(int32_t x) { return _mm512_set1_epi32(x); }
  static BITNET_INLINE type bit_and(type a, type b) { return _mm512_and_si512(a, b); }
  template <int N>
  static BITNET_INLINE type shift(type v) {
    return _mm512_srli_epi16(v, N);
  }
  static BITNET_INLINE type maddubs(type codes, type q) { return _mm512_maddubs_epi16(codes, q); }
  static BITNET_INLINE type add16(type a, type b) { return _mm512_add_epi16(a, b); }
  // a += b in place: GCC 12 spends a register move on every sum of a tile, and spills some.
  static BITNET_INLINE void accumulate16(type& a, type b) {
    __asm__("vpaddw %1, %0, %0" : "+v"(a) : "v"(b));
  }
  static BITNET_INLINE type add32(type a, type b) { return _mm512_add_epi32(a, b); }
  static BITNET_INLINE type widen(type v) { return _mm512_madd_epi16(v, _mm512_set1_epi16(1)); }
};

}  // namespace

const TernaryKernels ternary_avx512 = table<Maddubs<V512>>("avx512");

}  // namespace bitnet
