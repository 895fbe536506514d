#include "rowwise/rowwise.h"

namespace bitnet {

const RowwiseKernels rowwise_avx2 = {"avx2"};

}  // namespace bitnet
