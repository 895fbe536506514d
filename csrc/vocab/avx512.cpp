#include "vocab/vocab.h"

namespace bitnet {

const VocabKernels vocab_avx512 = {"avx512"};

}  // namespace bitnet
