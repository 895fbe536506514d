#include "ternary/ternary.h"

namespace bitnet {

const TernaryKernels ternary_avxvnni = {"avxvnni"};

}  // namespace bitnet
