// Fills of causal mask patterns. Row i of a mask has at most two visible runs of keys:
//
//   key        0 .... prefix ........ begin(i) ........ end(i) ........ k_len ........ width
//   element    attend        hide     attend            hide            hide (padding)
//
//   diagonal d = i + past,  begin = max(0, d - left),  end = min(k_len, d + 1)
//
// Rows from q_len on are padding and wholly hidden.
#pragma once
#include "base/types.h"

namespace bitnet {

constexpr int64_t kUnbounded = -1;

struct MaskPattern {
  int64_t q_len, k_len;   // valid queries and keys
  int64_t past;           // keys before the first query
  int64_t left;           // keys seen before the diagonal, or kUnbounded
  int64_t prefix;         // keys that every query sees
  int64_t width;          // elements of a row, >= k_len
  int64_t stride;         // bytes from row to row
  int32_t element_size;   // 1, 2 or 4 bytes
  uint32_t attend, hide;  // bits of the two values, repeated to 4 bytes
};

struct MaskKernels {
  const char* isa;
  // Rows [begin, end) of the mask at `out`.
  void (*fill)(void* out, const MaskPattern* pattern, int64_t begin, int64_t end);
};

extern const MaskKernels mask_scalar;
extern const MaskKernels mask_avx2;
extern const MaskKernels mask_avx512;

}  // namespace bitnet
