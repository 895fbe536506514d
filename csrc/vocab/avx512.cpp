#include "base/lanes_avx512.h"
#include "vocab/vocab_impl.h"

namespace bitnet {

const VocabKernels vocab_avx512 = BITNET_VOCAB_KERNELS(avx512);

}  // namespace bitnet
