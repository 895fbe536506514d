#include "ternary/vnni512.h"

namespace bitnet {

const TernaryKernels ternary_avx512vnni = table<Vnni512>("avx512vnni");

}  // namespace bitnet
