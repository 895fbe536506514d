#include "screen/dot512.h"

namespace bitnet {

const ScreenKernels screen_avx512vnni = screen_kernels<Dot512>("avx512vnni");

}  // namespace bitnet
