#include "ternary/ternary.h"

namespace bitnet {

const TernaryKernels ternary_scalar = {"scalar"};

}  // namespace bitnet
