#include "base/lanes_scalar.h"
#include "vocab/vocab_impl.h"

namespace bitnet {

const VocabKernels vocab_scalar = BITNET_VOCAB_KERNELS(scalar);

}  // namespace bitnet
