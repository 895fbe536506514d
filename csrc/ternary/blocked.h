// The loops around every ISA's inner kernels.  A kernel file includes its float lanes
// (base/lanes_*.h), then this, and defines a struct I with
//
//   enum { rows };          rows of q that one tile takes at most
//   enum { gemv_rows };     rows up to which gemv is worth its repeated unpacking
//   enum { gemv_group, gemv_group5 };   rows that one pass of gemv2, gemv5 takes at most
//   bool dense;             as in TernaryKernels
//   tile<R>(codes, quads, q, q_stride, fresh, acc)         acc[r][0..63] (+)= sum q c, r < R
//   gemv2 / gemv5(packed, blocks, ahead, q, q_stride, rows, acc)  acc[r][0..63] = sum q c
//
// codes: u8 [quads][64 outputs][4 k]; gemv reads blocks of 2-bit fields or of five digits.
//
// and instantiates table<I>(name).  Everything is internal to that file.
#pragma once
#include "base/counts.h"
#include "ternary/ternary.h"

namespace bitnet {
namespace {

// 64 bytes as the compiler's own vectors, which it lowers to those of each ISA.
typedef uint64_t Words __attribute__((vector_size(64)));
typedef uint16_t Pairs __attribute__((vector_size(64)));

// Four values of a row, as one integer to broadcast.
BITNET_INLINE int32_t quad_at(const int8_t* q) {
  int32_t quad;
  __builtin_memcpy(&quad, q, 4);
  return quad;
}

// 256 bytes -> u8 codes [4 quads][256].
BITNET_INLINE void unpack2(const uint8_t* packed, uint8_t* codes) {
  for (int strip = 0; strip < kBlockBytes; strip += 64) {
    Words v;
    __builtin_memcpy(&v, packed + strip, 64);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const Words fields = v >> 2 * t & 0x0303030303030303u;
      __builtin_memcpy(codes + t * kBlockBytes + strip, &fields, 64);
    }
  }
}

// 256 bytes -> u8 codes [5 quads][256].  A byte is a fraction r / 256 in base 3: its next digit is
// floor(3 r / 256), and 3 r mod 256 stays.
BITNET_INLINE void unpack5(const uint8_t* packed, uint8_t* codes) {
  for (int strip = 0; strip < kBlockBytes; strip += 64) {
    Pairs both;
    __builtin_memcpy(&both, packed + strip, 64);
    Pairs even = both & 255, odd = both >> 8;
#pragma GCC unroll 5
    for (int t = 0; t < 5; ++t) {
      even += even + even;
      odd += odd + odd;
      const Pairs digits = even >> 8 | (odd & 0xff00);
      __builtin_memcpy(codes + t * kBlockBytes + strip, &digits, 64);
      even &= 255;
      odd &= 255;
    }
  }
}

// Blocks in sequence -> u8 codes [blocks][quads][256].
BITNET_INLINE void unpack(const uint8_t* packed, int64_t blocks, int32_t quads, uint8_t* codes) {
  for (int64_t b = 0; b < blocks; ++b, packed += kBlockBytes, codes += quads * kBlockBytes) {
    for (int line = 0; line < kBlockBytes; line += BITNET_LINE)
      __builtin_prefetch(packed + 4096 + line);
    quads == 4 ? unpack2(packed, codes) : unpack5(packed, codes);
  }
}

// Sixteen outputs from output `n` of row `m` on, of which `count` are real.
BITNET_INLINE void finish16(const TernaryProduct& p, int64_t m, int64_t n, int count, I16 acc) {
  const F16 a = to_float(acc), s = set1(p.s[m]);
  const F16 scale = load(p.scale + n);  // padded to whole panels
  F16 y = p.divide ? div(a, mul(scale, s)) : mul(div(a, s), scale);
  float* out = p.out + m * p.out_stride + n;
  if (count == kLanes) {
    if (p.bias) y = add(y, load(p.bias + n));
    store(out, p.residual ? add(load(out), y) : y);
  } else {
    if (p.bias) y = add(y, load_partial(p.bias + n, count));
    store_partial(out, p.residual ? add(load_partial(out, count), y) : y, count);
  }
}

// Sums of one row and panel, each too large by `excess` -> the caller's array.
BITNET_INLINE void finish(const TernaryProduct& p, int64_t m, int64_t panel, const int32_t* acc,
                          int32_t excess) {
  const int64_t first = panel * kPanel;
  const int cols = p.n - first < kPanel ? int(p.n - first) : kPanel;
  const I16 sum = set1_int(excess);
  for (int j = 0; j < cols; j += kLanes) {
    const int count = cols - j < kLanes ? cols - j : kLanes;
    const I16 exact = sub(load_int(acc + j), sum);
    if (!p.acc) {
      finish16(p, m, first + j, count, exact);
      continue;
    }
    int32_t* out = p.acc + m * p.out_stride + first + j;
    if (count == kLanes) {
      store_int(out, exact);
    } else {
      int32_t all[kLanes];
      store_int(all, exact);
      for (int i = 0; i < count; ++i) out[i] = all[i];
    }
  }
}

BITNET_INLINE void prefetch_out(const TernaryProduct& p, int64_t m, int64_t panel) {
  const int64_t at = m * p.out_stride + panel * kPanel;
  const char* out =
      p.acc ? reinterpret_cast<const char*>(p.acc + at) : reinterpret_cast<const char*>(p.out + at);
  for (int line = 0; line < kPanel * 4; line += BITNET_LINE) __builtin_prefetch(out + line, 1);
}

constexpr int kGemmRows = 384;  // most rows of one gemm task: its sums stay in L2

// I's tile, or what goes on beside it.
template <class I>
struct Tile {
  template <int R>
  BITNET_INLINE void run(const uint8_t* codes, int64_t quads, const int8_t* q, int64_t q_stride,
                         bool fresh, int32_t* acc) {
    I::template tile<R>(codes, quads, q, q_stride, fresh, acc);
  }
};

template <class I>
constexpr int64_t gemm_scratch =
    int64_t(I::step * kPanel) + int64_t(kGemmRows + I::rows) * kPanel * 4;

template <class I, class T>
void gemm_panel(const TernaryProduct& p, int64_t panel, int64_t begin, int64_t end, void* scratch,
                T tile) {
  uint8_t* codes = static_cast<uint8_t*>(scratch);
  int32_t* acc = reinterpret_cast<int32_t*>(codes + I::step * kPanel);
  const int64_t block_k = 4 * p.quads, step = I::step / block_k;
  const uint8_t* packed = p.panels + panel * p.blocks * kBlockBytes;
  for (int64_t b = 0; b < p.blocks; b += step) {
    const int64_t blocks = p.blocks - b < step ? p.blocks - b : step;
    unpack(packed + b * kBlockBytes, blocks, p.quads, codes);
    const bool last = b + step >= p.blocks;
    for (int64_t m = begin; m < end; m += I::rows) {
      const int64_t rows = end - m < I::rows ? end - m : int64_t(I::rows);
      int32_t* sums = acc + (m - begin) * kPanel;
      // The tile hides the way of the output's lines to L1.
      if (last)
        for (int64_t r = m; r < m + rows; ++r) prefetch_out(p, r, panel);
      const int8_t* q = p.q + m * p.q_stride + b * block_k;
      with_count<I::rows>(rows, [&]<int R> {
        tile.template run<R>(codes, blocks * p.quads, q, p.q_stride, b == 0, sums);
      });
      if (last)
        for (int64_t r = 0; r < rows; ++r)
          finish(p, m + r, panel, sums + r * kPanel, p.sums[m + r]);
    }
  }
}

template <class I>
void gemm(const TernaryProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end,
          void* scratch) {
  for (int64_t panel = first; panel < last; ++panel)
    gemm_panel<I>(p, panel, begin, end, scratch, Tile<I>());
}

// Rows go in groups of equal size, as few as there can be: each reads the panel once, the first of
// them from memory.
template <class I>
void gemv(const TernaryProduct& p, int64_t first, int64_t last) {
  constexpr int most2 = I::gemv_group, most5 = I::gemv_group5;
  alignas(BITNET_LINE) int32_t acc[(most2 > most5 ? most2 : most5) * kPanel];
  const int64_t most = p.quads == 4 ? most2 : most5, groups = (p.rows + most - 1) / most;
  const int64_t group = (p.rows + groups - 1) / groups;
  for (int64_t panel = first; panel < last; ++panel) {
    const uint8_t* packed = p.panels + panel * p.blocks * kBlockBytes;
    for (int64_t m = 0; m < p.rows; m += group) {
      const int rows = int(p.rows - m < group ? p.rows - m : group);
      const int8_t* q = p.q + m * p.q_stride;
      if (p.quads == 4)
        I::gemv2(packed, p.blocks, p.ahead, q, p.q_stride, rows, acc);
      else
        I::gemv5(packed, p.blocks, p.ahead, q, p.q_stride, rows, acc);
      for (int r = 0; r < rows; ++r) finish(p, m + r, panel, acc + r * kPanel, p.sums[m + r]);
    }
  }
}

// The rows begin..end-1 of a product.
BITNET_INLINE TernaryProduct rows_of(TernaryProduct p, int64_t begin, int64_t end) {
  p.rows = end - begin;
  p.q += begin * p.q_stride;
  p.sums += begin;
  if (p.acc) {
    p.acc += begin * p.out_stride;
  } else {
    p.s += begin;
    p.out += begin * p.out_stride;
  }
  return p;
}

int32_t sum_row(const int8_t* q, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += q[i];
  return sum;
}

template <class I>
constexpr TernaryKernels table(const char* isa) {
  return {isa,     I::gemv_rows, kGemmRows,       1,      24, 1, I::dense,
          gemv<I>, gemm<I>,      gemm_scratch<I>, sum_row};
}

}  // namespace
}  // namespace bitnet
