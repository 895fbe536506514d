// The loops around every ISA's inner kernels.  A kernel file defines a struct I with
//
//   enum { rows };          rows of q that one micro call takes at most
//   enum { gemv_rows };     rows up to which gemv is worth its repeated unpacking
//   micro(codes, quads, q, q_stride, rows, fresh, acc)     acc[r][0..63] (+)= sum q c
//   gemv2 / gemv5(packed, blocks, q, q_stride, rows, acc)  acc[r][0..63] = sum q c
//
// codes: u8 [quads][64 outputs][4 k]; gemv reads blocks of 2-bit fields or of five digits.
//
// and instantiates table<I>(name).  Everything is internal to that file.
#pragma once
#include "ternary/ternary.h"

namespace bitnet {
namespace {

// k of one unpacked block: whole blocks of both storages (320 = 20 * 16 = 16 * 20), 20 KiB of
// codes, so that codes and six rows of q stay in L1.
constexpr int kStep = 320;
constexpr int kStepCodes = kStep * kPanel;

// 256 bytes -> u8 codes [4 quads][256].
BITNET_INLINE void unpack2(const uint8_t* __restrict packed, uint8_t* __restrict codes) {
  uint64_t words[kBlockBytes / 8], fields[kBlockBytes / 8];
  __builtin_memcpy(words, packed, kBlockBytes);
  for (int t = 0; t < 4; ++t) {
    for (int i = 0; i < kBlockBytes / 8; ++i) fields[i] = words[i] >> 2 * t & 0x0303030303030303u;
    __builtin_memcpy(codes + t * kBlockBytes, fields, kBlockBytes);
  }
}

// 256 bytes -> u8 codes [5 quads][256].  A byte is a fraction r / 256 in base 3: its next digit is
// floor(3 r / 256), 1 from r = 86 and 2 from r = 171 on, and 3 r mod 256 stays.
BITNET_INLINE void unpack5(const uint8_t* __restrict packed, uint8_t* __restrict codes) {
  uint8_t r[kBlockBytes];
  __builtin_memcpy(r, packed, kBlockBytes);
  for (int t = 0; t < 5; ++t)
    for (int i = 0; i < kBlockBytes; ++i) {
      codes[t * kBlockBytes + i] = uint8_t((r[i] >= 86) + (r[i] >= 171));
      r[i] = uint8_t(3 * r[i]);
    }
}

// Sums of one row and panel -> the caller's array.  `cols` <= 64 outputs are real.
BITNET_INLINE void finish(const TernaryProduct& p, int64_t m, int64_t panel,
                          const int32_t* __restrict acc) {
  const int64_t first = panel * kPanel;
  const int64_t cols = p.n - first < kPanel ? p.n - first : kPanel;
  const int32_t sum = p.sums[m];
  if (p.acc) {
    int32_t* __restrict out = p.acc + m * p.out_stride + first;
    for (int64_t j = 0; j < cols; ++j) out[j] = acc[j] - sum;
    return;
  }
  const float s = p.s[m];
  const float* __restrict scale = p.scale + first;
  float* __restrict out = p.out + m * p.out_stride + first;
  float y[kPanel];
  if (p.divide)
    for (int64_t j = 0; j < cols; ++j) y[j] = float(acc[j] - sum) / (scale[j] * s);
  else
    for (int64_t j = 0; j < cols; ++j) y[j] = (float(acc[j] - sum) / s) * scale[j];
  if (p.bias)
    for (int64_t j = 0; j < cols; ++j) y[j] += p.bias[first + j];
  if (p.residual)
    for (int64_t j = 0; j < cols; ++j) out[j] += y[j];
  else
    for (int64_t j = 0; j < cols; ++j) out[j] = y[j];
}

template <class I>
void gemm(const TernaryProduct& p, int64_t panel, int64_t begin, int64_t end, void* scratch) {
  uint8_t* codes = static_cast<uint8_t*>(scratch);
  int32_t* acc = reinterpret_cast<int32_t*>(codes + kStepCodes);
  const int64_t block_k = 4 * p.quads, step = kStep / block_k;
  const uint8_t* packed = p.panels + panel * p.blocks * kBlockBytes;
  for (int64_t b = 0; b < p.blocks; b += step) {
    const int64_t blocks = p.blocks - b < step ? p.blocks - b : step;
    for (int64_t i = 0; i < blocks; ++i) {
      const uint8_t* from = packed + (b + i) * kBlockBytes;
      uint8_t* to = codes + i * p.quads * kBlockBytes;
      p.quads == 4 ? unpack2(from, to) : unpack5(from, to);
    }
    for (int64_t m = begin; m < end; m += I::rows) {
      const int64_t rows = end - m < I::rows ? end - m : int64_t(I::rows);
      I::micro(codes, blocks * p.quads, p.q + m * p.q_stride + b * block_k, p.q_stride, int(rows),
               b == 0, acc + (m - begin) * kPanel);
    }
  }
  for (int64_t m = begin; m < end; ++m) finish(p, m, panel, acc + (m - begin) * kPanel);
}

template <class I>
void gemv(const TernaryProduct& p, int64_t begin, int64_t end) {
  alignas(BITNET_LINE) int32_t acc[I::gemv_rows * kPanel];
  for (int64_t panel = begin; panel < end; ++panel) {
    const uint8_t* packed = p.panels + panel * p.blocks * kBlockBytes;
    if (p.quads == 4)
      I::gemv2(packed, p.blocks, p.q, p.q_stride, int(p.rows), acc);
    else
      I::gemv5(packed, p.blocks, p.q, p.q_stride, int(p.rows), acc);
    for (int64_t m = 0; m < p.rows; ++m) finish(p, m, panel, acc + m * kPanel);
  }
}

int32_t sum_row(const int8_t* q, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += q[i];
  return sum;
}

template <class I>
constexpr TernaryKernels table(const char* isa) {
  return {isa,
          I::gemv_rows,
          gemv<I>,
          gemm<I>,
          kStepCodes + int64_t(kGemmRows + I::rows) * kPanel * 4,
          sum_row};
}

}  // namespace
}  // namespace bitnet
