#pragma once
#include "base/types.h"

namespace bitnet {

struct TernaryKernels {
  const char* isa;
};

extern const TernaryKernels ternary_scalar;
extern const TernaryKernels ternary_avx2;
extern const TernaryKernels ternary_avxvnni;
extern const TernaryKernels ternary_avx512;
extern const TernaryKernels ternary_avx512vnni;

}  // namespace bitnet
