#include "ternary/ternary.h"

namespace bitnet {

const TernaryKernels ternary_avx512 = {"avx512"};

}  // namespace bitnet
