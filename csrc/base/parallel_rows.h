// How row-wise work is cut into tasks and takes its memory.
#pragma once
#include <algorithm>
#include <atomic>

#include "base/threads.h"
#include "base/types.h"

namespace bitnet {

// fn(begin, end) over [0, rows) in parallel, blocks of about `elements` elements of `width` each.
template <class F>
void parallel_rows(int64_t rows, int64_t width, int64_t elements, F&& fn) {
  const int64_t block = std::max<int64_t>(1, elements / std::max<int64_t>(1, width));
  parallel_for((rows + block - 1) / block,
               [&](int64_t task) { fn(task * block, std::min(rows, (task + 1) * block)); });
}

// The same with scratch bytes for each thread, taken by the caller: memory that is refused raises
// here, before anything is written, and not on a pool thread.
template <class F>
void parallel_rows_scratch(int64_t rows, int64_t block, int64_t bytes, F&& fn) {
  const int64_t blocks = (rows + block - 1) / block;
  const int64_t workers = std::min<int64_t>(num_threads(), blocks);
  bytes = (bytes + BITNET_LINE - 1) / BITNET_LINE * BITNET_LINE;
  char* scratch = static_cast<char*>(thread_scratch(std::max<int64_t>(1, workers) * bytes));
  std::atomic<int64_t> next{0};
  parallel_for(workers, [&](int64_t worker) {
    for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < blocks;)
      fn(b * block, std::min(rows, (b + 1) * block), scratch + worker * bytes);
  });
}

}  // namespace bitnet
