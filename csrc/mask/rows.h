// The runs of a row, over a fill_bytes(p, n, bits) that the including file defines.
#pragma once
#include "mask/mask.h"

namespace bitnet {
namespace {

BITNET_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

BITNET_INLINE void fill_row(uint8_t* row, const MaskPattern& p, int64_t i) {
  const int64_t size = p.element_size, diagonal = i + p.past;
  int64_t prefix = 0, begin = 0, end = 0;
  if (i < p.q_len) {
    prefix = clamp(p.prefix, 0, p.k_len);
    end = clamp(diagonal + 1, prefix, p.k_len);
    begin = p.left == kUnbounded ? prefix : clamp(diagonal - p.left, prefix, end);
  }
  fill_bytes(row, prefix * size, p.attend);
  fill_bytes(row + prefix * size, (begin - prefix) * size, p.hide);
  fill_bytes(row + begin * size, (end - begin) * size, p.attend);
  fill_bytes(row + end * size, (p.width - end) * size, p.hide);
}

void fill_rows(void* out, const MaskPattern* pattern, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    fill_row(static_cast<uint8_t*>(out) + i * pattern->stride, *pattern, i);
}

}  // namespace
}  // namespace bitnet
