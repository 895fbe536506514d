#include "attention/attention.h"

namespace bitnet {

const AttentionKernels attention_avx512 = {"avx512"};

}  // namespace bitnet
