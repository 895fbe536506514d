#include "attention/attention.h"
#include "base/lanes_avx512.h"
#include "rowwise/math.h"

namespace bitnet {
namespace {
constexpr int kSharing = kTileVectors;
}
}  // namespace bitnet

#include "attention_int8/attend_int8.h"

namespace bitnet {

const AttentionInt8Kernels attention_int8_avx512vnni = {"avx512vnni", chunk_int8};

}  // namespace bitnet
