#include "run/run.h"

#include "base/fpenv.h"
#include "base/parallel_rows.h"
#include "dispatch/dispatch.h"
#include "dispatch/metrics.h"

namespace bitnet {

void run_mask_fill(void* out, MaskElement element, const MaskSizes& sizes, int64_t rows,
                   int64_t width, int64_t stride) {
  const MaskKernels& kernel = *kernels().mask;
  const MetricsScope scope("mask_fill", kernel.isa, rows * width * mask_element_bytes(element));
  mask_fill(kernel, out, element, sizes, rows, width, stride);
}

void run_norm(const Rows<float>& x, const Norm& norm, const NormStats& stats, const RowsOut& out) {
  const RowwiseKernels& k = *kernels().rowwise;
  const MetricsScope scope("norm", k.isa, x.rows * x.cols * 8);
  const RowsIn rows{x.data, x.stride, x.cols};
  parallel_rows(x.rows, x.cols, kTaskElements,
                [&](int64_t begin, int64_t end) { k.norm(rows, norm, stats, out, begin, end); });
}

void run_norm_quant(const RowsIn& x, const Norm& norm, const Quantised& out, int64_t rows) {
  const RowwiseKernels& k = *kernels().rowwise;
  const MetricsScope scope("norm_quant", k.isa, rows * x.width * 5);
  parallel_rows(rows, x.width, kTaskElements,
                [&](int64_t begin, int64_t end) { k.norm_quant(x, norm, out, begin, end); });
}

void run_quantise(const RowsIn& x, const int32_t* tops, const Quantised& out, int64_t rows) {
  const RowwiseKernels& k = *kernels().rowwise;
  const MetricsScope scope("quantise", k.isa, rows * x.width * 5);
  parallel_rows(rows, x.width, kTaskElements,
                [&](int64_t begin, int64_t end) { k.quantise(x, tops, out, begin, end); });
}

void run_act_quant(const Rows<float>& x, Activation act, bool gated, const Norm& norm,
                   const Quantised& out) {
  const int64_t width = gated ? x.cols / 2 : x.cols;
  const RowwiseKernels& k = *kernels().rowwise;
  const MetricsScope scope("act_quant", k.isa, x.rows * (x.cols * 4 + width));
  const RowsIn rows{x.data, x.stride, width};
  const int64_t block = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width));
  parallel_rows_scratch(x.rows, block, width * 4, [&](int64_t begin, int64_t end, void* scratch) {
    k.act_quant(rows, act, gated, norm, out, static_cast<float*>(scratch), begin, end);
  });
}

void run_ternary(const TernaryMatrix& w, const TernaryProduct& p) {
  const TernaryKernels& table = *kernels().ternary;
  const int64_t bytes = w.panel_bytes() + p.rows * (w.k + (p.residual ? 8 : 4) * w.n);
  const FpEnv environment;
  const MetricsScope scope(ternary_op(table, w, p.rows), table.isa, bytes);
  ternary_product(table, w, p);
}

bool runs_activation(const TernaryMatrix& w, int64_t rows, bool gated) {
  return has_activation(*kernels().ternary, w, rows, gated);
}

void run_ternary_activated(const TernaryMatrix& w, const TernaryProduct& p,
                           const TernaryActivation& a) {
  const TernaryKernels& table = *kernels().ternary;
  const int64_t bytes = w.panel_bytes() + p.rows * (w.k + 4 * w.n / (a.gated ? 2 : 1));
  const FpEnv environment;
  const MetricsScope scope(ternary_op(table, w, p.rows), table.isa, bytes);
  ternary_activated(table, *kernels().rowwise, w, p, a);
}

}  // namespace bitnet
