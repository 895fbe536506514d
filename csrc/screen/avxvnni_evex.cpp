#include "screen/dot256.h"

namespace bitnet {

const ScreenKernels screen_avxvnni_evex = screen_kernels<Dot256>("avxvnni_evex");

}  // namespace bitnet
