#include "base/lanes_avx2.h"
#include "ternary/bytes256.h"
#include "ternary/maddubs.h"

namespace bitnet {
namespace {

struct V256 : Bytes256 {
  static constexpr int rows = 6, parts = 2, group = 10;
  // a += b in place: GCC 12 spends a register move on every sum of a tile, and spills some.
  static BITNET_INLINE void accumulate16(type& a, type b) {
    __asm__("vpaddw %1, %0, %0" : "+v"(a) : "v"(b));
  }
};

}  // namespace

const TernaryKernels ternary_avx2 = table<Maddubs<V256>>("avx2");

}  // namespace bitnet
