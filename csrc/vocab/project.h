// The whole vocabulary projection on all threads.
#pragma once
#include "vocab/vocab.h"

namespace bitnet {

// Every row of a table of `vocab` rows.
void project(const VocabKernels& kernels, const Projection& p, int64_t vocab);

}  // namespace bitnet
