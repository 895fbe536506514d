#include "screen/dot256.h"

namespace bitnet {

const ScreenKernels screen_avxvnni = screen_kernels<Dot256>("avxvnni");

}  // namespace bitnet
