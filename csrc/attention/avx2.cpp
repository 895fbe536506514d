#include "base/lanes_avx2.h"
//
#include "attention/append.h"
#include "rowwise/math.h"

namespace bitnet {
namespace {
constexpr int kSharing = kTileVectors;
}
}  // namespace bitnet

#include "attention/attend.h"

namespace bitnet {

const AttentionKernels attention_avx2 = {"avx2", append, chunk, merge, finish};

}  // namespace bitnet
