#include "ternary/mixed512.h"

namespace bitnet {

const TernaryKernels ternary_avx512vnni = table<Vnni512>("avx512vnni");
const TernaryKernels ternary_avx512vnni_mixed = mixed_table("avx512vnni");

}  // namespace bitnet
