// The definition of the screen's dot product: one byte at a time.
#include "base/lanes_scalar.h"
#include "screen/screen_impl.h"

namespace bitnet {
namespace {

struct Plain {
  static constexpr int bytes = 1, lines = 1;
  static BITNET_INLINE int32_t load(const uint8_t* p) { return *p; }
  template <int Bits, int I>
  static BITNET_INLINE int32_t part(int32_t c) {
    return c >> Bits * I & ((1 << Bits) - 1);
  }
  template <int I>
  static BITNET_INLINE int32_t six(int32_t nibbles, int32_t pairs) {
    return 4 * part<4, I % 2>(nibbles) + part<2, I>(pairs);
  }
  static BITNET_INLINE int32_t zero() { return 0; }
  static BITNET_INLINE int32_t add(int32_t sum, int32_t code, const int8_t* x) {
    return sum + code * *x;
  }
  static BITNET_INLINE int32_t total(int32_t sum) { return sum; }
};

}  // namespace

const ScreenKernels screen_scalar = screen_kernels<Plain>("scalar");

}  // namespace bitnet
