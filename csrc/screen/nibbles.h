// The screen's dot product over a vector V of bytes (base/bytes256.h, bytes512.h); `Lines` lines of
// 64 bytes fit the registers.
#pragma once
#include "screen/screen_impl.h"

namespace bitnet {
namespace {

template <class V, int Lines>
struct Nibbles {
  static constexpr int bytes = V::bytes, lines = Lines;
  using type = typename V::type;
  static BITNET_INLINE type load(const void* p) { return V::load(p); }
  static BITNET_INLINE type low_half(type c) { return V::bit_and(c, V::set1(15)); }
  static BITNET_INLINE type high_half(type c) { return low_half(V::template shift<4>(c)); }
  static BITNET_INLINE type zero() { return V::zero(); }
  static BITNET_INLINE type add(type sums, type nibbles, const int8_t* x) {
    return V::dot(sums, nibbles, V::load(x));
  }
  static BITNET_INLINE int32_t total(type sums) { return V::total(sums); }
};

}  // namespace
}  // namespace bitnet
