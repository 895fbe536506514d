#pragma once
#include "base/types.h"

namespace bitnet {

struct VocabKernels {
  const char* isa;
};

extern const VocabKernels vocab_scalar;
extern const VocabKernels vocab_avx2;
extern const VocabKernels vocab_avx512;

}  // namespace bitnet
