#include "ternary/vnni256.h"

namespace bitnet {

const TernaryKernels ternary_avxvnni = table<Vnni256>("avxvnni");

}  // namespace bitnet
