#include "vocab/project.h"

#include "base/parallel_rows.h"

namespace bitnet {

constexpr int64_t kStreamElements = 65536;  // of the table, a task

void project(const VocabKernels& kernels, const Projection& p, int64_t vocab) {
  if (p.rows < kernels.many_rows)
    return parallel_rows(vocab, p.width, kStreamElements,
                         [&](int64_t begin, int64_t end) { kernels.project_few(p, begin, end); });
  parallel_rows_scratch(vocab, kPanelRows, projection_scratch(p.width) * 4,
                        [&](int64_t begin, int64_t end, void* scratch) {
                          kernels.project_many(p, begin, end, static_cast<float*>(scratch));
                        });
}

}  // namespace bitnet
