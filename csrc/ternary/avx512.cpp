#include "base/lanes_avx512.h"
#include "ternary/bytes512.h"
#include "ternary/maddubs.h"

namespace bitnet {
namespace {

struct V512 : Bytes512 {
  static constexpr int rows = 6, parts = 4, group = 11;
  // a += b in place: GCC 12 spends a register move on every sum of a tile, and spills some.
  static BITNET_INLINE void accumulate16(type& a, type b) {
    __asm__("vpaddw %1, %0, %0" : "+v"(a) : "v"(b));
  }
};

}  // namespace

const TernaryKernels ternary_avx512 = table<Maddubs<V512>>("avx512");

}  // namespace bitnet
