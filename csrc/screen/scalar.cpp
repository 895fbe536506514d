// The definition of the screen's dot product: one byte at a time.
#include "base/lanes_scalar.h"
#include "screen/screen_impl.h"

namespace bitnet {
namespace {

struct Plain {
  static constexpr int bytes = 1, lines = 1;
  static BITNET_INLINE int32_t load(const uint8_t* p) { return *p; }
  static BITNET_INLINE int32_t low_half(int32_t c) { return c & 15; }
  static BITNET_INLINE int32_t high_half(int32_t c) { return c >> 4; }
  static BITNET_INLINE int32_t zero() { return 0; }
  static BITNET_INLINE int32_t add(int32_t sum, int32_t nibble, const int8_t* x) {
    return sum + nibble * *x;
  }
  static BITNET_INLINE int32_t total(int32_t sum) { return sum; }
};

}  // namespace

const ScreenKernels screen_scalar = screen_kernels<Plain>("scalar");

}  // namespace bitnet
