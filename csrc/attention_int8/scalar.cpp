#include "attention/attention.h"
#include "base/lanes_scalar.h"
#include "rowwise/math.h"

namespace bitnet {
namespace {
constexpr int kSharing = 1;
}
}  // namespace bitnet

#include "attention_int8/attend_int8.h"

namespace bitnet {

const AttentionInt8Kernels attention_int8_scalar = {"scalar", chunk_int8};

}  // namespace bitnet
