// The definition: one element after the other.
#include "mask/mask.h"

namespace bitnet {
namespace {

bool sees(const MaskPattern& p, int64_t i, int64_t key) {
  if (i >= p.q_len || key >= p.k_len) return false;
  const int64_t diagonal = i + p.past;
  const bool in_window = p.left == kUnbounded || key >= diagonal - p.left;
  return key < p.prefix || (key <= diagonal && in_window);
}

void fill(void* out, const MaskPattern* p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    uint8_t* row = static_cast<uint8_t*>(out) + i * p->stride;
    for (int64_t key = 0; key < p->width; ++key) {
      const uint32_t bits = sees(*p, i, key) ? p->attend : p->hide;
      for (int64_t b = 0; b < p->element_size; ++b)
        row[key * p->element_size + b] = uint8_t(bits >> (8 * b));
    }
  }
}

}  // namespace

const MaskKernels mask_scalar = {"scalar", fill};

}  // namespace bitnet
