#include "attention/attention.h"

namespace bitnet {

const AttentionKernels attention_scalar = {"scalar"};

}  // namespace bitnet
