#pragma once
#include "base/types.h"

namespace bitnet {

struct RowwiseKernels {
  const char* isa;
};

extern const RowwiseKernels rowwise_scalar;
extern const RowwiseKernels rowwise_avx2;
extern const RowwiseKernels rowwise_avx512;

}  // namespace bitnet
