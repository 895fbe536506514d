#include "screen/dot256.h"

namespace bitnet {

const ScreenKernels screen_avx2 = screen_kernels<Dot256>("avx2");

}  // namespace bitnet
