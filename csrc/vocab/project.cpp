#include "vocab/project.h"

#include "base/parallel_rows.h"

namespace bitnet {

constexpr int64_t kTaskProducts = 65536;  // of elements of the table and rows of x

void project(const VocabKernels& kernels, const Projection& p, int64_t vocab) {
  const int64_t width = std::max<int64_t>(1, p.width);
  const int64_t products = width * std::max<int64_t>(1, p.rows) * kPanelRows;  // of a panel
  const int64_t panels = std::max<int64_t>(1, kTaskProducts / products);
  parallel_rows(vocab, width, panels * kPanelRows * width,
                [&](int64_t begin, int64_t end) { kernels.project(p, begin, end); });
}

}  // namespace bitnet
