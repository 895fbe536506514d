#include "base/lanes_scalar.h"
#include "rowwise/rowwise_impl.h"

namespace bitnet {

const RowwiseKernels rowwise_scalar = BITNET_ROWWISE_KERNELS(scalar);

}  // namespace bitnet
