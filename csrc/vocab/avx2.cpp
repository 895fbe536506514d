#include "base/lanes_avx2.h"
#include "vocab/vocab_impl.h"

namespace bitnet {

const VocabKernels vocab_avx2 = BITNET_VOCAB_KERNELS(avx2);

}  // namespace bitnet
