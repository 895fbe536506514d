#include "base/lanes_avx512.h"
#include "rowwise/rowwise_impl.h"

namespace bitnet {

const RowwiseKernels rowwise_avx512 = BITNET_ROWWISE_KERNELS(avx512);

}  // namespace bitnet
