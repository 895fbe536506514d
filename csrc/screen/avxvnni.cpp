#include "base/bytes256.h"
#include "base/lanes_avx2.h"
#include "screen/nibbles.h"

namespace bitnet {

const ScreenKernels screen_avxvnni = screen_kernels<Nibbles<Bytes256, 4>>("avxvnni");

}  // namespace bitnet
