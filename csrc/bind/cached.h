// Checked calls over the paged KV cache, as the ops and the layers make them.
#pragma once
#include "bind/bind.h"
#include "run/cached.h"

namespace bitnet {

// Claims the cache for one binding, unless this thread's lease already does. Raises RuntimeError
// when another call has it.
class Claim : KVCacheUse {
 public:
  explicit Claim(KVCache& cache);
};

// Query and kv heads of rows q | k | v of `cols` floats.
HeadCounts heads_of(int64_t cols, const KVCache& cache, int64_t layer);
// cos, sin: float32 [P, dk / 2] or None.
RopeRows rope_rows_of(const py::object& cos, const py::object& sin, int32_t dk);
// The cache must be claimed: its lengths and pages are read. `seq`, `pos`: int32 [rows].
AppendCall append_call(const Rows<float>& qkv, const RopeRows& rope, const KVCache& cache,
                       int64_t layer, const py::array& seq, const py::array& pos);
// `starts`: int32 [batch + 1], `first_pos`: int32 [batch].
AttendCall attend_call(const Rows<float>& qkv, const KVCache& cache, int64_t layer,
                       const py::array& starts, const py::array& first_pos, float scale,
                       int64_t window_left, const Rows<float>& out);

}  // namespace bitnet
