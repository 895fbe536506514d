#include "attention/attention.h"

namespace bitnet {

const AttentionKernels attention_avx2 = {"avx2"};

}  // namespace bitnet
