#include "ternary/ternary.h"

namespace bitnet {

const TernaryKernels ternary_avx512vnni = {"avx512vnni"};

}  // namespace bitnet
