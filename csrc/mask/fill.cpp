#include "mask/fill.h"

#include <algorithm>

#include "base/threads.h"

namespace bitnet {
namespace {

constexpr int64_t kTaskBytes = 1 << 18;  // less than this is not worth a second thread

struct ElementRow {
  int32_t bytes;
  uint32_t attend, hide;  // repeated to 4 bytes
};
constexpr ElementRow kElements[] = {
    {4, 0, 0xff800000u},
    {2, 0, 0xfc00fc00u},
    {1, 0x01010101u, 0},
};

}  // namespace

int64_t mask_element_bytes(MaskElement element) { return kElements[int(element)].bytes; }

bool mask_sizes_valid(const MaskSizes& s) {
  const auto fits = [](int64_t size) { return size >= 0 && size <= kMaskLimit; };
  return fits(s.q_len) && fits(s.k_len) && fits(s.past) && fits(s.prefix) &&
         (fits(s.left) || s.left == kUnbounded);
}

void mask_fill(const MaskKernels& kernels, void* out, MaskElement element, const MaskSizes& sizes,
               int64_t rows, int64_t width, int64_t stride) {
  const ElementRow& e = kElements[int(element)];
  const MaskPattern pattern = {sizes.q_len, sizes.k_len, sizes.past, sizes.left, sizes.prefix,
                               width,       stride,      e.bytes,    e.attend,   e.hide};
  const int64_t block = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, width * e.bytes));
  parallel_for((rows + block - 1) / block, [&](int64_t task) {
    kernels.fill(out, &pattern, task * block, std::min(rows, (task + 1) * block));
  });
}

}  // namespace bitnet
