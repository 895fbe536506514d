#include "vocab/vocab.h"

namespace bitnet {

const VocabKernels vocab_avx2 = {"avx2"};

}  // namespace bitnet
