#include "rowwise/rowwise.h"

namespace bitnet {

const RowwiseKernels rowwise_scalar = {"scalar"};

}  // namespace bitnet
