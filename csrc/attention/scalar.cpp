#include "base/lanes_scalar.h"
//
#include "attention/append.h"
#include "rowwise/math.h"

namespace bitnet {
namespace {
constexpr int kSharing = 1;  // arrays in memory: sharing loads gains nothing
}
}  // namespace bitnet

#include "attention/attend.h"
#include "attention/attend_backward.h"

namespace bitnet {

const AttentionKernels attention_scalar = {
    "scalar",       append,           chunk,        merge, finish, dense_chunk, dense_finish,
    backward_stats, backward_queries, backward_keys};

}  // namespace bitnet
