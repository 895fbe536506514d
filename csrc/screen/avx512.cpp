#include "base/bytes512.h"
#include "base/lanes_avx512.h"
#include "screen/plane_dot.h"

namespace bitnet {

const ScreenKernels screen_avx512 = screen_kernels<PlaneDot<Bytes512>>("avx512");

}  // namespace bitnet
