// The vocabulary projection and the selection of its largest logits; gradients of projections.
#pragma once
#include "base/types.h"

namespace bitnet {

// out[m][v] = (sum over e of x[m][e] * table[v][e]) * scales[v] + bias[v], the sum in 16 lanes
// (lane = e mod 16, one fused multiply-add each, ascending) and one tree: the same bits for any
// number of rows on either side.
struct Projection {
  const float* x;  // [rows, width]
  int64_t x_stride;
  const void* table;  // [V, width] as the checkpoint stores it
  int64_t table_stride;
  Dtype dtype;
  const float* scales;  // [V] or null
  const float* bias;    // [V] or null
  float* out;           // [rows, V], or more rows where there are places
  int64_t out_stride;
  int64_t rows, width;
  const int32_t* places = nullptr;  // [rows] the row of out of each row of x; null: the same

  float* out_row(int64_t m) const { return out + (places ? places[m] : m) * out_stride; }
};

// out[n][k] += sum over t of a[t][n] * b[t][k], one sequential fused multiply-add over t for each
// element: terms in parts, one call each, give the bits of one call.
struct SumProducts {
  const float* a;  // [terms, outputs], strides of both
  int64_t a_term, a_output;
  const float* b;  // [terms, width]
  int64_t b_stride;
  float* out;  // [outputs, width]
  int64_t out_stride;
  int64_t terms, width;
};

struct VocabKernels {
  const char* isa;
  // Table rows [begin, end).
  void (*project)(const Projection& p, int64_t begin, int64_t end);
  // The k largest of n in descending order; equal values by ascending id, NaN last.
  // keys: [k] of scratch.
  void (*topk)(const float* x, int64_t n, int64_t k, uint64_t* keys, int32_t* ids, float* values);
  // table row = q * scale, scale = absmax / 127; a row that is not finite: q = 0, scale = NaN.
  void (*quantise)(const void* table, Dtype dtype, int64_t stride, int64_t width, int8_t* q,
                   float* scales, int64_t begin, int64_t end);
  // Outputs [begin, end).
  void (*sum_products)(const SumProducts& p, int64_t begin, int64_t end);
};

constexpr int64_t kPanelRows = 32;  // of the table, in L2 while many rows of x pass

extern const VocabKernels vocab_scalar;
extern const VocabKernels vocab_avx2;
extern const VocabKernels vocab_avx512;

}  // namespace bitnet
