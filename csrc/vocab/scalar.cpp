#include "vocab/vocab.h"

namespace bitnet {

const VocabKernels vocab_scalar = {"scalar"};

}  // namespace bitnet
