// Products with ternary matrices: y[m,n] = sum_k q[m,k] w[n,k], q int8, w in {-1, 0, 1}, exact.
//
// Stored are codes c = w + 1 in {0, 1, 2}, the unsigned operand of u8 x s8 dot products:
//   sum_k q w = sum_k q c - sum_k q
// |sum_k q c| <= 2 * 128 * k fits int32 for every k up to kTernaryMaxK.
//
// Layout 1: panels of 64 outputs o, each a run of 256-byte blocks, a block = 4 strips of 64 bytes,
// a strip = 16 outputs, a byte = one output and one k mod 4:
//
//   panel p        | block 0       | block 1       | ...     block: 16 k (2 bits), 20 k (1.6 bits)
//   block          | strip 0 | strip 1 | strip 2 | strip 3 | strip s: outputs 64p + 16s .. + 15
//   strip          | o0 k0 | o0 k1 | o0 k2 | o0 k3 | o1 k0 | ... | o15 k3 |   byte 4 (o % 16) + k %
//   4 byte, 2 bits   code of k-quad t of the block at bits 2t, 2t+1                     t = 0..3
//   byte, 1.6 bits ceil(256 d / 243), d = five base-3 digits, k-quad 0 most significant
//
// Outputs past n and k past the end hold code 1 (weight 0).
#pragma once
#include "base/types.h"

namespace bitnet {

constexpr int kTernaryLayout = 1;  // stored layout version
constexpr int kPanel = 64;         // outputs of a panel
constexpr int kBlockBytes = 256;   // bytes of a block
constexpr int kTernaryMaxK = 1 << 22;

// One product and what becomes of its sums.  Rows of q are zero from k to blocks * block_k.
struct TernaryProduct {
  const uint8_t* panels;  // [ceil(n / 64)][blocks][256]
  int64_t n, blocks;
  int32_t quads;    // k-quads a block: 4 (2 bits) or 5 (1.6 bits)
  int64_t ahead;    // bytes that gemv prefetches ahead of its reads
  const int8_t* q;  // [rows, blocks * 4 * quads], rows q_stride bytes apart
  int64_t rows, q_stride;
  const int32_t* sums;  // [rows] sum_k q[m,k]

  int32_t* acc;        // [rows, n] the integers; null: the scaled form below
  const float* s;      // [rows] activation scales
  const float* scale;  // [n]
  bool divide;         // y = acc / (scale * s), else y = (acc / s) * scale
  bool residual;       // out += y, else out = y
  const float* bias;   // [n] or null, added to y
  float* out;          // [rows, n]
  int64_t out_stride;  // elements between rows of acc or out
};

struct TernaryKernels {
  const char* isa;
  int32_t gemv_rows;    // gemv reads the packed bytes once a few rows, gemm is for many
  int32_t gemm_rows;    // most rows of a gemm task
  int32_t gemm_panels;  // most panels of one
  int32_t row_grain;    // rows of one that leave no tile half empty
  int32_t least_rows;   // of one, where its panels can be shared out instead
  bool dense;           // gemv of 1.6 bits keeps up with 2, where a CPU has vector units to spare
  // Every row, panels first..last-1.
  void (*gemv)(const TernaryProduct& p, int64_t first, int64_t last);
  // Rows begin..end-1 of panels first..last-1, with gemm_scratch bytes on a cache line.
  void (*gemm)(const TernaryProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end,
               void* scratch);
  int64_t gemm_scratch;
  // sum of k int8
  int32_t (*sum)(const int8_t* q, int64_t k);
};

extern const TernaryKernels ternary_scalar;
extern const TernaryKernels ternary_avx2;
extern const TernaryKernels ternary_avxvnni;
extern const TernaryKernels ternary_avxvnni_evex;
extern const TernaryKernels ternary_avx512;
extern const TernaryKernels ternary_avx512vnni;
extern const TernaryKernels ternary_avx512vnni_mixed;  // for CPUs with vector units to spare
extern const TernaryKernels ternary_amx_int8;

}  // namespace bitnet
