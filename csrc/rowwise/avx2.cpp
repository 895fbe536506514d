#include "base/lanes_avx2.h"
#include "rowwise/rowwise_impl.h"

namespace bitnet {

const RowwiseKernels rowwise_avx2 = BITNET_ROWWISE_KERNELS(avx2);

}  // namespace bitnet
