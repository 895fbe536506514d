#include "base/bytes512.h"
#include "base/lanes_avx512.h"
#include "ternary/maddubs.h"

namespace bitnet {
namespace {

struct V512 : Bytes512 {
  static constexpr int gemv_rows = 24, gemv_group = 11;
};

}  // namespace

const TernaryKernels ternary_avx512 = maddubs_table<V512>("avx512");

}  // namespace bitnet
