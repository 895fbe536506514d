#include "rowwise/rowwise.h"

namespace bitnet {

const RowwiseKernels rowwise_avx512 = {"avx512"};

}  // namespace bitnet
