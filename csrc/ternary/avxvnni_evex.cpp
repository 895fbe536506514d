// The AVX-VNNI kernels for processors that have the instruction in EVEX form only.
#include "ternary/vnni256.h"

namespace bitnet {

const TernaryKernels ternary_avxvnni_evex = table<Vnni256>("avxvnni_evex");

}  // namespace bitnet
