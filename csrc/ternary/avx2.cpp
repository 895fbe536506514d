#include "base/bytes256.h"
#include "base/lanes_avx2.h"
#include "ternary/maddubs.h"

namespace bitnet {
namespace {

struct V256 : Bytes256 {
  static constexpr int gemv_rows = 24, gemv_group = 10;
};

}  // namespace

const TernaryKernels ternary_avx2 = maddubs_table<V256>("avx2");

}  // namespace bitnet
