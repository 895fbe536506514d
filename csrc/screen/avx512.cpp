#include "screen/dot512.h"

namespace bitnet {

const ScreenKernels screen_avx512 = screen_kernels<Dot512>("avx512");

}  // namespace bitnet
