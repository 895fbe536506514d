#include "ternary/product.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/cpu.h"
#include "base/threads.h"

namespace bitnet {
namespace {

// A fork-join costs up to 12 us when the workers sleep: less work than this stays on the caller.
constexpr int64_t kSerialMacs = 1 << 18;
// Above it the wrapped sums of the 1.6-bit gemv would no longer be exact (see the kernels).
constexpr int64_t kMaxDigitFreeK = 32767;

bool takes_gemv(const TernaryKernels& kernels, const TernaryMatrix& w, int64_t rows) {
  return rows <= kernels.gemv_rows && !(w.quads == 5 && w.k > kMaxDigitFreeK);
}

bool is_small(const TernaryMatrix& w, int64_t rows) { return w.n * w.k * rows < kSerialMacs; }

template <class F>
void for_tasks(int64_t tasks, bool serial, const F& task) {
  if (!serial) return parallel_for(tasks, [&](int64_t i) { task(i); });
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

int64_t blocks_of(int64_t k, int32_t quads) {
  return std::max<int64_t>(1, (k + 4 * quads - 1) / (4 * quads));
}

// How far gemv prefetches. 4 KB take a Cascade Lake from 80% of its read bandwidth to all of it,
// and any machine through the arithmetic of several rows. One row leaves a Zen 4's own prefetchers
// enough time, and every request costs: with none it reads 31.5 GB/s and not 28.7 (two threads;
// one: 24 and 21), with four rows 18 and not 24.
int64_t ahead_of(int64_t rows) {
  static const bool amd = made_by_amd();
  return rows == 1 && amd ? 0 : 4096;
}

// Row sums of q, and rows that are padded with zeros where the matrix is wider than q.
void prepare(const TernaryKernels& kernels, const TernaryMatrix& w, TernaryProduct& p) {
  const int64_t width = w.blocks * w.block_k();
  const bool pad = width != w.k;
  const int64_t sum_bytes = round_up(p.rows * 4, BITNET_LINE);
  const int64_t stride = round_up(width, BITNET_LINE);
  uint8_t* memory = static_cast<uint8_t*>(call_scratch(sum_bytes + (pad ? p.rows * stride : 0)));
  int32_t* sums = reinterpret_cast<int32_t*>(memory);
  int8_t* padded = reinterpret_cast<int8_t*>(memory + sum_bytes);
  const int64_t grain = p.rows * width < kSerialMacs ? std::max<int64_t>(p.rows, 1) : 16;
  const TernaryProduct from = p;
  parallel_for((p.rows + grain - 1) / grain, [&](int64_t task) {
    for (int64_t m = task * grain; m < std::min(p.rows, (task + 1) * grain); ++m) {
      const int8_t* row = from.q + m * from.q_stride;
      sums[m] = kernels.sum(row, w.k);
      if (!pad) continue;
      if (w.k > 0) std::memcpy(padded + m * stride, row, size_t(w.k));
      std::memset(padded + m * stride + w.k, 0, size_t(width - w.k));
    }
  });
  p.sums = sums;
  if (pad) {
    p.q = padded;
    p.q_stride = stride;
  }
}

void run_gemv(const TernaryKernels& kernels, const TernaryMatrix& w, const TernaryProduct& p) {
  const int64_t panels = w.panel_count();
  const int64_t tasks = is_small(w, p.rows) ? 1 : std::min<int64_t>(panels, 4 * num_threads());
  parallel_for(tasks, [&](int64_t task) {
    kernels.gemv(p, panels * task / tasks, panels * (task + 1) / tasks);
  });
}

int64_t parts_of(int64_t count, int64_t most) { return (count + most - 1) / most; }

// Rows of a task: fewer than the kernel takes where there would be too few tasks, `across` beside
// each other, for all threads.
int64_t task_rows(const TernaryKernels& kernels, int64_t rows, int64_t across, int64_t wanted) {
  const int64_t most = std::max<int64_t>(1, rows / kernels.least_rows);
  const int64_t down =
      std::max(parts_of(rows, kernels.gemm_rows), std::min(parts_of(wanted, across), most));
  return std::min<int64_t>(kernels.gemm_rows, round_up(parts_of(rows, down), kernels.row_grain));
}

// Tasks are (panels, rows), the panels running fastest: threads share the rows of q in L3.  A
// kernel that takes many panels at once loses by every part of them, and gets as few tasks as
// leave no thread behind.
void run_gemm(const TernaryKernels& kernels, const TernaryMatrix& w, const TernaryProduct& p) {
  const int64_t panels = w.panel_count();
  const bool serial = is_small(w, p.rows);
  const int64_t threads = serial ? 1 : num_threads();
  const int64_t wanted = threads * (kernels.gemm_panels > 1 || serial ? 1 : 2);
  const int64_t least = parts_of(panels, kernels.gemm_panels);
  const int64_t rows = task_rows(kernels, p.rows, least, wanted), down = parts_of(p.rows, rows);
  const bool even = 8 * (rows * down - p.rows) <= p.rows;  // the last rows are about as many
  int64_t across = std::min(panels, std::max(least, parts_of(wanted, down)));
  while (across < panels && across * (even ? down : 1) % threads != 0) ++across;
  for_tasks(across * down, serial, [&](int64_t task) {
    const int64_t begin = task / across * rows, end = std::min(p.rows, begin + rows);
    const int64_t part = task % across;
    kernels.gemm(p, panels * part / across, panels * (part + 1) / across, begin, end,
                 thread_scratch(kernels.gemm_scratch));
  });
}

// Rows begin..end-1 of the outputs from `panel` on, into a tile.
TernaryProduct tile_of(TernaryProduct p, int64_t panel, int64_t begin, int64_t end, float* tile,
                       int64_t stride) {
  const int64_t first = panel * kPanel;
  p.panels += panel * p.blocks * kBlockBytes;
  p.n -= first;
  p.scale += first;
  if (p.bias) p.bias += first;
  p.q += begin * p.q_stride;
  p.sums += begin;
  p.s += begin;
  p.rows = end - begin;
  p.out = tile;
  p.out_stride = stride;
  return p;
}

void raise_top(int32_t& top, int32_t value) {
  const std::atomic_ref<int32_t> shared(top);
  for (int32_t now = shared.load(std::memory_order_relaxed);
       now < value && !shared.compare_exchange_weak(now, value, std::memory_order_relaxed);) {
  }
}

// A task is a panel of the result, for gated activations one of each half.
void run_activated(const TernaryKernels& kernels, const RowwiseKernels& rowwise,
                   const TernaryMatrix& w, const TernaryProduct& p, const TernaryActivation& a) {
  const int64_t halves = a.gated ? 2 : 1, panels = w.panel_count() / halves;
  const bool serial = is_small(w, p.rows);
  const int64_t rows = task_rows(kernels, p.rows, panels, serial ? 1 : 2 * num_threads());
  const int64_t tile_floats = rows * halves * kPanel;
  if (a.tops) std::fill_n(a.tops, p.rows, 0);
  for_tasks(panels * parts_of(p.rows, rows), serial, [&](int64_t task) {
    const int64_t begin = task / panels * rows, end = std::min(p.rows, begin + rows);
    const int64_t panel = task % panels, column = panel * kPanel;
    char* scratch = static_cast<char*>(
        thread_scratch(kernels.gemm_scratch + (tile_floats + rows) * int64_t(sizeof(float))));
    float* tile = reinterpret_cast<float*>(scratch + kernels.gemm_scratch);
    int32_t* tops = a.tops ? reinterpret_cast<int32_t*>(tile + tile_floats) : nullptr;
    for (int64_t half = 0; half < halves; ++half)
      kernels.gemm(
          tile_of(p, half * panels + panel, begin, end, tile + half * kPanel, halves * kPanel), 0,
          1, 0, end - begin, scratch);
    const int64_t width = std::min<int64_t>(kPanel, w.n / halves - column);
    rowwise.activate({tile, halves * kPanel, width}, a.act, a.gated,
                     {p.out + begin * p.out_stride + column, p.out_stride}, tops, 0, end - begin);
    for (int64_t m = begin; tops && m < end; ++m) raise_top(a.tops[m], tops[m - begin]);
  });
}

// What the matrix and the CPU say of a product.
void describe(const TernaryKernels& kernels, const TernaryMatrix& w, TernaryProduct& p) {
  p.panels = w.panel(0);
  p.n = w.n;
  p.blocks = w.blocks;
  p.quads = w.quads;
  p.ahead = ahead_of(p.rows);
  p.scale = w.scales();
  p.divide = w.divide;
  prepare(kernels, w, p);
}

}  // namespace

int64_t ternary_bytes(int64_t n, int64_t k, int32_t quads) {
  const int64_t outputs = round_up(n, kPanel);
  return outputs / kPanel * blocks_of(k, quads) * kBlockBytes + outputs * int64_t(sizeof(float));
}

TernaryMatrix::TernaryMatrix(int64_t rows, int64_t cols, int32_t quads_of_block)
    : n(rows),
      k(cols),
      blocks(blocks_of(cols, quads_of_block)),
      quads(quads_of_block),
      panels(Buffer::lasting(size_t(panel_count() * blocks * kBlockBytes))),
      scale(size_t(round_up(rows, kPanel)) * sizeof(float)) {}

void TernaryMatrix::set_scales(const float* values, bool each) {
  uniform_scale = true;
  for (int64_t i = 0; i < n; ++i) {
    scales()[i] = values[each ? i : 0];
    uniform_scale = uniform_scale && scales()[i] == scales()[0];
  }
}

// 1.6 bits are a fifth less to read, and five vector operations a code to decode. A Zen 4 does them
// beside vpdpbusd, an Intel core on the same two ports.
int32_t preferred_quads(const TernaryKernels& kernels, int64_t k) {
  return kernels.dense && made_by_amd() && k <= kMaxDigitFreeK ? 5 : 4;
}

const char* ternary_op(const TernaryKernels& kernels, const TernaryMatrix& w, int64_t rows) {
  return takes_gemv(kernels, w, rows) ? "ternary_gemv" : "ternary_gemm";
}

void ternary_product(const TernaryKernels& kernels, const TernaryMatrix& w, TernaryProduct p) {
  if (p.rows == 0 || w.n == 0) return;
  describe(kernels, w, p);
  if (takes_gemv(kernels, w, p.rows))
    run_gemv(kernels, w, p);
  else
    run_gemm(kernels, w, p);
}

bool has_activation(const TernaryKernels& kernels, const TernaryMatrix& w, int64_t rows,
                    bool gated) {
  return !takes_gemv(kernels, w, rows) && kernels.gemm_panels == 1 &&
         (!gated || w.n % (2 * kPanel) == 0);
}

void ternary_activated(const TernaryKernels& kernels, const RowwiseKernels& rowwise,
                       const TernaryMatrix& w, TernaryProduct p, const TernaryActivation& a) {
  if (p.rows == 0 || w.n == 0) return;
  describe(kernels, w, p);
  run_activated(kernels, rowwise, w, p, a);
}

}  // namespace bitnet
