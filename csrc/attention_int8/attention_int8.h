// Dense attention (attention/dense.h) of int8 codes.
#pragma once
#include "attention/dense.h"

namespace bitnet {

// Per query, key and value vector, over 64 keys from a multiple of 64 on; sums are integers, exact
// in any order and below 2^24, so exact as floats too:
//   x    = code * x_scale       code = rint(x * 127 / a), x_scale = a / 127, a = max(max|x|, 1e-30)
//   s[j] = (q . k[j]) * k_scale[j] * (q_scale * scale)           <= 1024 * 127^2
//   p[j] = exp(s[j] - m), w[j] = p[j] * v_scale[j], b = max(max w, 1e-30)
//   o    = o * c + (b / 2047) * sum rint(w[j] * 2047 / b) v[j]   <= 64 * 2047 * 127
// A vector with NaN or infinity in it has the scale NaN: seen, it makes the row NaN; hidden, it
// shows nowhere. Scales belong to one vector and b to keys that the row sees, so that nothing
// depends on keys that come later.
struct AttentionInt8Kernels {
  const char* isa;
  // States of the task's vectors over one chunk, as AttentionKernels::dense_chunk.
  void (*chunk)(const DenseTask& task, int64_t chunk, float* states, float* scratch);
};

extern const AttentionInt8Kernels attention_int8_scalar;
extern const AttentionInt8Kernels attention_int8_avx2;
extern const AttentionInt8Kernels attention_int8_avxvnni;
extern const AttentionInt8Kernels attention_int8_avxvnni_evex;
extern const AttentionInt8Kernels attention_int8_avx512;
extern const AttentionInt8Kernels attention_int8_avx512vnni;

}  // namespace bitnet
