#include "base/lanes_avx2.h"
#include "ternary/maddubs.h"

namespace bitnet {
namespace {

struct V256 {
  using type = __m256i;
  static constexpr int bytes = 32, rows = 6, parts = 2;
  static BITNET_INLINE type zero() { return _mm256_setzero_si256(); }
  static BITNET_INLINE type set1(char byte) { return _mm256_set1_epi8(byte); }
  static BITNET_INLINE type load(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static BITNET_INLINE void store(void* p, type v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
  static BITNET_INLINE type set1_int(int32_t x) { return _mm256_set1_epi32(x); }
  static BITNET_INLINE type bit_and(type a, type b) { return _mm256_and_si256(a, b); }
  template <int N>
  static BITNET_INLINE type shift(type v) {
    return _mm256_srli_epi16(v, N);
  }
  static BITNET_INLINE type maddubs(type codes, type q) { return _mm256_maddubs_epi16(codes, q); }
  static BITNET_INLINE type add16(type a, type b) { return _mm256_add_epi16(a, b); }
  // a += b in place: GCC 12 spends a register move on every sum of a tile, and spills some.
  static BITNET_INLINE void accumulate16(type& a, type b) {
    __asm__("vpaddw %1, %0, %0" : "+v"(a) : "v"(b));
  }
  static BITNET_INLINE type add32(type a, type b) { return _mm256_add_epi32(a, b); }
  static BITNET_INLINE type widen(type v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }
};

}  // namespace

const TernaryKernels ternary_avx2 = table<Maddubs<V256>>("avx2");

}  // namespace bitnet
