// The screen's dot product over a vector V of bytes (base/bytes256.h, bytes512.h).
#pragma once
#include "screen/screen_impl.h"

namespace bitnet {
namespace {

template <class V>
struct PlaneDot {
  static constexpr int bytes = V::bytes, lines = 2;
  using type = typename V::type;
  static BITNET_INLINE type load(const void* p) { return V::load(p); }
  template <int Bits, int I>
  static BITNET_INLINE type part(type c) {
    return V::bit_and(V::template shift<Bits * I>(c), V::set1((1 << Bits) - 1));
  }
  // Shifts of 16 bits: what crosses a byte is masked away.
  template <int I>
  static BITNET_INLINE type six(type nibbles, type pairs) {
    const type u = I % 2 ? V::template shift<2>(nibbles) : V::template shift_left<2>(nibbles);
    return V::bit_or(V::bit_and(u, V::set1(0x3c)), part<2, I>(pairs));
  }
  static BITNET_INLINE type zero() { return V::zero(); }
  static BITNET_INLINE type add(type sums, type codes, const int8_t* x) {
    return V::dot(sums, codes, V::load(x));
  }
  static BITNET_INLINE int32_t total(type sums) { return V::total(sums); }
};

}  // namespace
}  // namespace bitnet
