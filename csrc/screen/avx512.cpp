#include "base/bytes512.h"
#include "base/lanes_avx512.h"
#include "screen/nibbles.h"

namespace bitnet {

const ScreenKernels screen_avx512 = screen_kernels<Nibbles<Bytes512, 5>>("avx512");

}  // namespace bitnet
