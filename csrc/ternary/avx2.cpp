#include "ternary/ternary.h"

namespace bitnet {

const TernaryKernels ternary_avx2 = {"avx2"};

}  // namespace bitnet
