// Ternary kernels on AMX tiles of 16 rows x 64 bytes, for 16 rows and more; fewer are VNNI's.
// One tdpbsud multiplies 16 rows of q by 16 outputs (a strip) over 64 k:
//
//   sums[m][n] += sum_t sum_i q[m][4t + i] codes[t][4n + i]     m, n, t < 16, i < 4; s8 x u8, int32
//
// Unpacked codes [k-quads][64 outputs][4 k] are that second operand where they lie, 256 bytes from
// one k-quad to the next; so are the sums [rows][64].  What fills no tile of k is VNNI's; rows that
// fill none are multiplied together with the last ones before them, and those sums left unused.
#include "ternary/vnni512.h"

namespace bitnet {
namespace {

constexpr int kTileRows = 16, kTileK = 64, kTileQuads = 16;
constexpr int kStep = 640;  // k unpacked at a time: 40 KB of codes

// What ldtilecfg reads: eight tiles of 16 rows x 64 bytes.
struct alignas(BITNET_LINE) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr TileConfig kConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The calling thread's tiles, given back after use: a thread without any is cheaper to switch.
BITNET_INLINE void take_tiles() { __asm__ volatile("ldtilecfg %0" ::"m"(kConfig)); }
BITNET_INLINE void release_tiles() { __asm__ volatile("tilerelease"); }

// 32 rows x 2 strips over chunks > 0 of 64 k: sums tmm0-3 (row r, strip s: tmm 2 (r / 16) + s),
// rows of q tmm4-5, strips of codes tmm6-7.  4 loads feed 4 products.
void tile32(const uint8_t* codes, int64_t chunks, const int8_t* q, int64_t q_stride, bool fresh,
            int32_t* acc) {
  const int8_t* q16 = q + kTileRows * q_stride;
  __asm__ volatile(
      "test %[fresh], %[fresh]\n\t"
      "jz 1f\n\t"
      "tilezero %%tmm0\n\t"
      "tilezero %%tmm1\n\t"
      "tilezero %%tmm2\n\t"
      "tilezero %%tmm3\n\t"
      "jmp 2f\n"
      "1:\n\t"
      "tileloadd (%[acc],%[row]), %%tmm0\n\t"
      "tileloadd 64(%[acc],%[row]), %%tmm1\n\t"
      "tileloadd (%[acc16],%[row]), %%tmm2\n\t"
      "tileloadd 64(%[acc16],%[row]), %%tmm3\n\t"
      ".p2align 5\n"
      "2:\n\t"
      "tileloadd (%[q],%[stride]), %%tmm4\n\t"
      "tileloadd (%[codes],%[row]), %%tmm6\n\t"
      "tdpbsud %%tmm6, %%tmm4, %%tmm0\n\t"
      "tileloadd 64(%[codes],%[row]), %%tmm7\n\t"
      "tdpbsud %%tmm7, %%tmm4, %%tmm1\n\t"
      "tileloadd (%[q16],%[stride]), %%tmm5\n\t"
      "tdpbsud %%tmm6, %%tmm5, %%tmm2\n\t"
      "tdpbsud %%tmm7, %%tmm5, %%tmm3\n\t"
      "add $4096, %[codes]\n\t"
      "add $64, %[q]\n\t"
      "add $64, %[q16]\n\t"
      "dec %[chunks]\n\t"
      "jnz 2b\n\t"
      "tilestored %%tmm0, (%[acc],%[row])\n\t"
      "tilestored %%tmm1, 64(%[acc],%[row])\n\t"
      "tilestored %%tmm2, (%[acc16],%[row])\n\t"
      "tilestored %%tmm3, 64(%[acc16],%[row])\n\t"
      : [codes] "+r"(codes), [q] "+r"(q), [q16] "+r"(q16), [chunks] "+r"(chunks)
      : [stride] "r"(q_stride), [row] "r"(int64_t(kBlockBytes)), [acc] "r"(acc),
        [acc16] "r"(acc + kTileRows * kPanel), [fresh] "r"(int(fresh))
      : "cc", "memory");
}

// 16 rows x 4 strips over chunks > 0 of 64 k: sums tmm0-3, rows of q tmm4, codes tmm5-7 by turns.
void tile16(const uint8_t* codes, int64_t chunks, const int8_t* q, int64_t q_stride, bool fresh,
            int32_t* acc) {
  __asm__ volatile(
      "test %[fresh], %[fresh]\n\t"
      "jz 1f\n\t"
      "tilezero %%tmm0\n\t"
      "tilezero %%tmm1\n\t"
      "tilezero %%tmm2\n\t"
      "tilezero %%tmm3\n\t"
      "jmp 2f\n"
      "1:\n\t"
      "tileloadd (%[acc],%[row]), %%tmm0\n\t"
      "tileloadd 64(%[acc],%[row]), %%tmm1\n\t"
      "tileloadd 128(%[acc],%[row]), %%tmm2\n\t"
      "tileloadd 192(%[acc],%[row]), %%tmm3\n\t"
      ".p2align 5\n"
      "2:\n\t"
      "tileloadd (%[q],%[stride]), %%tmm4\n\t"
      "tileloadd (%[codes],%[row]), %%tmm5\n\t"
      "tdpbsud %%tmm5, %%tmm4, %%tmm0\n\t"
      "tileloadd 64(%[codes],%[row]), %%tmm6\n\t"
      "tdpbsud %%tmm6, %%tmm4, %%tmm1\n\t"
      "tileloadd 128(%[codes],%[row]), %%tmm7\n\t"
      "tdpbsud %%tmm7, %%tmm4, %%tmm2\n\t"
      "tileloadd 192(%[codes],%[row]), %%tmm5\n\t"
      "tdpbsud %%tmm5, %%tmm4, %%tmm3\n\t"
      "add $4096, %[codes]\n\t"
      "add $64, %[q]\n\t"
      "dec %[chunks]\n\t"
      "jnz 2b\n\t"
      "tilestored %%tmm0, (%[acc],%[row])\n\t"
      "tilestored %%tmm1, 64(%[acc],%[row])\n\t"
      "tilestored %%tmm2, 128(%[acc],%[row])\n\t"
      "tilestored %%tmm3, 192(%[acc],%[row])\n\t"
      : [codes] "+r"(codes), [q] "+r"(q), [chunks] "+r"(chunks)
      : [stride] "r"(q_stride), [row] "r"(int64_t(kBlockBytes)), [acc] "r"(acc),
        [fresh] "r"(int(fresh))
      : "cc", "memory");
}

// Sums lie in slots of 16 rows.  The last of them holds the last 16 rows, some for a second time.
BITNET_INLINE int64_t first_row(int64_t slot, int64_t rows) {
  return slot + kTileRows <= rows ? slot : rows - kTileRows;
}

// The last quads < 16 of a row.
void short_tile(const uint8_t* codes, int64_t quads, const int8_t* q, int64_t q_stride, bool fresh,
                int32_t* acc) {
  for (int64_t r = 0; r < kTileRows; r += Vnni512::rows)
    with_count<Vnni512::rows>(kTileRows - r, [&]<int R> {
      Vnni512::tile<R>(codes, quads, q + r * q_stride, q_stride, fresh, acc + r * kPanel);
    });
}

// acc[slots of 16 rows][64] (+)= sum q c for rows >= 16.
void multiply(const uint8_t* codes, int64_t quads, const int8_t* q, int64_t q_stride, int64_t rows,
              bool fresh, int32_t* acc) {
  const int64_t chunks = quads / kTileQuads, rest = quads % kTileQuads;
  int64_t slot = 0;
  if (chunks > 0) {
    for (; slot + 2 * kTileRows <= rows; slot += 2 * kTileRows)
      for (int strip = 0; strip < 4; strip += 2)
        tile32(codes + strip * 64, chunks, q + slot * q_stride, q_stride, fresh,
               acc + slot * kPanel + strip * 16);
    for (; slot < rows; slot += kTileRows)
      tile16(codes, chunks, q + first_row(slot, rows) * q_stride, q_stride, fresh,
             acc + slot * kPanel);
  }
  if (rest == 0) return;
  for (slot = 0; slot < rows; slot += kTileRows)
    short_tile(codes + chunks * kTileQuads * kBlockBytes, rest,
               q + first_row(slot, rows) * q_stride + chunks * kTileK, q_stride,
               fresh && chunks == 0, acc + slot * kPanel);
}

void tiles_panel(const TernaryProduct& p, int64_t panel, int64_t begin, int64_t end,
                 void* scratch) {
  uint8_t* codes = static_cast<uint8_t*>(scratch);
  int32_t* acc = reinterpret_cast<int32_t*>(codes + kStep * kPanel);
  const int64_t block_k = 4 * p.quads, step = kStep / block_k, rows = end - begin;
  const uint8_t* packed = p.panels + panel * p.blocks * kBlockBytes;
  for (int64_t b = 0; b < p.blocks; b += step) {
    const int64_t blocks = p.blocks - b < step ? p.blocks - b : step;
    unpack(packed + b * kBlockBytes, blocks, p.quads, codes);
    multiply(codes, blocks * p.quads, p.q + begin * p.q_stride + b * block_k, p.q_stride, rows,
             b == 0, acc);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t slot = r / kTileRows * kTileRows;
    const int32_t* sums = acc + (slot + r - first_row(slot, rows)) * kPanel;
    finish(p, begin + r, panel, sums, p.sums[begin + r]);
  }
}

void tiles_gemm(const TernaryProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end,
                void* scratch) {
  if (end - begin < kTileRows) return gemm<Vnni512>(p, first, last, begin, end, scratch);
  take_tiles();
  for (int64_t panel = first; panel < last; ++panel) tiles_panel(p, panel, begin, end, scratch);
  release_tiles();
}

constexpr int64_t kScratch = int64_t(kStep) * kPanel + int64_t(kGemmRows) * kPanel * 4;
static_assert(kGemmRows % (2 * kTileRows) == 0);
static_assert(kScratch >= table<Vnni512>("").gemm_scratch);

}  // namespace

const TernaryKernels ternary_amx_int8 = {
    "amx_int8", kTileRows - 1, kGemmRows,  1,        2 * kTileRows, 1,
    true,       gemv<Vnni512>, tiles_gemm, kScratch, sum_row};

}  // namespace bitnet
