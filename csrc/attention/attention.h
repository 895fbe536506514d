#pragma once
#include "base/types.h"

namespace bitnet {

struct AttentionKernels {
  const char* isa;
};

extern const AttentionKernels attention_scalar;
extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;

}  // namespace bitnet
