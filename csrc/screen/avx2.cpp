#include "base/bytes256.h"
#include "base/lanes_avx2.h"
#include "screen/plane_dot.h"

namespace bitnet {

const ScreenKernels screen_avx2 = screen_kernels<PlaneDot<Bytes256>>("avx2");

}  // namespace bitnet
