// A ternary matrix in memory and products with it on all threads.
#pragma once
#include <cstdint>
#include <vector>

#include "base/arena.h"
#include "rowwise/rowwise.h"
#include "ternary/ternary.h"

namespace bitnet {

struct TernaryMatrix {
  int64_t n = 0, k = 0, blocks = 0;
  int32_t quads = 4;          // a block: 4 (2 bits) or 5 (1.6 bits)
  bool divide = false;        // the scale divides
  bool uniform_scale = true;  // every element of scale is the same
  Buffer panels;              // [ceil(n / 64)][blocks][256]
  Buffer scale;               // float [n]

  TernaryMatrix() = default;
  TernaryMatrix(int64_t n, int64_t k, int32_t quads);
  int64_t block_k() const { return 4 * quads; }
  int64_t panel_count() const { return (n + kPanel - 1) / kPanel; }
  int64_t panel_bytes() const { return panel_count() * blocks * kBlockBytes; }
  uint8_t* panel(int64_t p) const {
    return static_cast<uint8_t*>(panels.data()) + p * blocks * kBlockBytes;
  }
  // One scale for all outputs, or one each.
  void set_scales(const float* values, bool each);
  float* scales() const { return static_cast<float*>(scale.data()); }
};

// Quads of a block (4: 2 bits, 5: 1.6) that make products of a few rows the fastest.
int32_t preferred_quads(const TernaryKernels& kernels, int64_t k);

// Bytes that a matrix takes, its scales included.
int64_t ternary_bytes(int64_t n, int64_t k, int32_t quads);

// Which kernel a product of `rows` rows runs: "ternary_gemv" or "ternary_gemm".
const char* ternary_op(const TernaryKernels& kernels, const TernaryMatrix& w, int64_t rows);

// Runs the product on all threads.  The caller fills q, rows, q_stride and the outputs of `p`; the
// rows of q hold w.k values each.
void ternary_product(const TernaryKernels& kernels, const TernaryMatrix& w, TernaryProduct p);

// An epilogue: act(first half of the outputs) * second half or, not gated, act(outputs). Each tile
// is activated where it was computed, so that the outputs themselves never leave the cache.
struct TernaryActivation {
  Activation act;
  bool gated;
  int32_t* tops;  // [rows] of the result, see Quantised; null: not wanted
};

// Whether a product of `rows` rows has it: kernels of few rows and of many panels at once do not,
// and halves have to be whole panels.
bool has_activation(const TernaryKernels& kernels, const TernaryMatrix& w, int64_t rows,
                    bool gated);
// As ternary_product; out, of which there is no residual, is the activation's.
void ternary_activated(const TernaryKernels& kernels, const RowwiseKernels& rowwise,
                       const TernaryMatrix& w, TernaryProduct p, const TernaryActivation& a);

// codes - 1, int8 [n, k].
void ternary_unpack(const TernaryMatrix& w, int8_t* out);

}  // namespace bitnet
