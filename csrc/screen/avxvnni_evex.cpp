#include "base/bytes256.h"
#include "base/lanes_avx2.h"
#include "screen/nibbles.h"

namespace bitnet {

const ScreenKernels screen_avxvnni_evex = screen_kernels<Nibbles<Bytes256, 4>>("avxvnni_evex");

}  // namespace bitnet
