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
#include "attention/attend_backward.h"

namespace bitnet {

const AttentionKernels attention_avx2 = {
    "avx2",         append,           chunk,        merge, finish, dense_chunk, dense_finish,
    backward_stats, backward_queries, backward_keys};

}  // namespace bitnet
