// Products of many rows by dot product and by lookup at once.
//
// vpdpbusd leaves a Zen 4 two of its four vector pipes and most of its loads. An entry of a lookup
// table (lookup.h) takes one load and one vpaddw, and stands for 128 or 160 products where a
// vpdpbusd does 64. So the last rows of a task, 32 at a time, go by lookup and the others by dot
// product, and one loop does both: a quad of six rows' dot products, and eight entries of an
// output.
#pragma once
#include <optional>

#include "base/bytes512.h"
#include "base/lanes_avx512.h"
#include "ternary/lookup.h"
#include "ternary/vnni512.h"

namespace bitnet {
namespace {

constexpr int kMixedRows = 256;  // of a task: codes are unpacked once for all of them

// Entries of two groups for the outputs of a panel: sums[o][m] (+)= sum_j tables[j][index(o, j)][m]
struct Lookup {
  const uint8_t* index;   // [2 groups][64 outputs][4]
  const int16_t* tables;  // [2 groups][4][entries][32]
  int16_t* sums;          // [64][32]
  bool fresh;             // the sums begin
};

// Adds entry j of an output to zmm31; its tables are [j] after each other.
#define ENTRY(j, at)          \
  "movzbl " at                \
  "(%[index]), %k[entry]\n\t" \
  "shl $6, %k[entry]\n\t"     \
  "vpaddw %c[table]*" j "(%[tables],%[entry]), %%zmm31, %%zmm31\n\t"
#define ROW(x, a, b, c, d, first, second)                                                      \
  "vpdpbusd %%zmm" x ", %%zmm24, %%zmm" a                                                      \
  "\n\t"                                                                                       \
  "vpdpbusd %%zmm" x ", %%zmm25, %%zmm" b "\n\t" first "vpdpbusd %%zmm" x ", %%zmm26, %%zmm" c \
  "\n\t"                                                                                       \
  "vpdpbusd %%zmm" x ", %%zmm27, %%zmm" d "\n\t" second

// tile6 of vnni512.h, and beside each of its first 64 quads an output of `lookup`: returns how many
// of those there were. tables: `entries` of 64 bytes in each.
template <int entries>
int64_t tile6_and_lookup(const uint8_t* codes, int64_t quads, const int8_t* q, int64_t q_stride,
                         bool fresh, int32_t* acc, const Lookup& lookup) {
  const int8_t* q3 = q + 3 * q_stride;
  const int64_t outputs = quads < kPanel ? quads : kPanel;
  const uint8_t* index = lookup.index;
  int16_t* sums = lookup.sums;
  int64_t both = outputs, rest = quads - outputs, entry = 0;
  __asm__ volatile(
      "test %[fresh], %[fresh]\n\t"
      "jz 1f\n\t" EVERY_SUM(CLEAR)
      "jmp 2f\n"
      "1:\n\t" EVERY_SUM(LOAD)
      "2:\n\t"
      "test %[both], %[both]\n\t"
      "jz 4f\n\t"
      ".p2align 5\n"
      "3:\n\t"
      "vmovdqa64 (%[codes]), %%zmm24\n\t"
      "vmovdqa64 64(%[codes]), %%zmm25\n\t"
      "vmovdqa64 128(%[codes]), %%zmm26\n\t"
      "vmovdqa64 192(%[codes]), %%zmm27\n\t"
      "vpbroadcastd (%[q]), %%zmm28\n\t"
      "vpbroadcastd (%[q],%[stride]), %%zmm29\n\t"
      "vpbroadcastd (%[q],%[stride],2), %%zmm30\n\t"
      "vmovdqa32 (%[sums]), %%zmm31%{%[kept]%}%{z%}\n\t"
      ROW("28", "0", "1", "2", "3", ENTRY("0", "0"), ENTRY("1", "1"))
      "vpbroadcastd (%[q3]), %%zmm28\n\t"
      ROW("29", "4", "5", "6", "7", ENTRY("2", "2"), "")
      "vpbroadcastd (%[q3],%[stride]), %%zmm29\n\t"
      ROW("30", "8", "9", "10", "11", ENTRY("3", "3"), ENTRY("4", "256"))
      "vpbroadcastd (%[q3],%[stride],2), %%zmm30\n\t"
      ROW("28", "12", "13", "14", "15", ENTRY("5", "257"), "")
      ROW("29", "16", "17", "18", "19", ENTRY("6", "258"), ENTRY("7", "259"))
      ROW("30", "20", "21", "22", "23", "", "")
      "vmovdqa64 %%zmm31, (%[sums])\n\t"
      "add $64, %[sums]\n\t"
      "add $4, %[index]\n\t"
      "add $256, %[codes]\n\t"
      "add $4, %[q]\n\t"
      "add $4, %[q3]\n\t"
      "dec %[both]\n\t"
      "jnz 3b\n"
      "4:\n\t"
      "test %[rest], %[rest]\n\t"
      "jz 6f\n"
      "5:\n\t" QUAD("0", "0", "64", "128", "192")
      "add $256, %[codes]\n\t"
      "add $4, %[q]\n\t"
      "add $4, %[q3]\n\t"
      "dec %[rest]\n\t"
      "jnz 5b\n"
      "6:\n\t" EVERY_SUM(STORE)
      : [codes] "+r"(codes), [q] "+r"(q), [q3] "+r"(q3), [both] "+r"(both), [rest] "+r"(rest),
        [index] "+r"(index), [sums] "+r"(sums), [entry] "+r"(entry)
      : [stride] "r"(q_stride), [acc] "r"(acc), [fresh] "r"(int(fresh)),
        [tables] "r"(lookup.tables), [kept] "Yk"(__mmask16(lookup.fresh ? 0 : -1)),
        [table] "i"(entries * kTile * 2)
      : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
        "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",
        "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",
        "xmm29", "xmm30", "xmm31");
  return outputs;
}

// The lookups of rows begin..end-1, a multiple of 32, in panels first..last-1, one panel and two
// groups at a time, for whoever has dot products to do beside them.
template <class C>
class LookupQueue {
 public:
  LookupQueue(const TernaryProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end,
              LookupScratch& scratch)
      : p_(p), first_(first), last_(last), begin_(begin), end_(end), scratch_(scratch) {
    if (begin_ < end_) start();
  }

  bool empty() const { return begin_ == end_; }
  Lookup front() {
    return {tile_->packed(panel_), scratch_.tables, tile_->narrow(panel_), tile_->fresh()};
  }
  // Adds the outputs from `done` on, and turns to the next lookup.
  void pop(const Lookup& lookup, int64_t done) {
    add_entries<Bytes512, C, kPair>(lookup.index + 4 * done, lookup.tables, lookup.fresh,
                                    lookup.sums + done * kTile, kPanel - done);
    tile_->close(panel_);
    if (++panel_ < last_) return;
    block_ += kPair;
    open();
  }

 private:
  void start() {
    tile_.emplace(p_, first_, last_, begin_, begin_ + kTile, scratch_);
    block_ = 0;
    open();
  }
  // A last group without a second is no queue's business.
  void open() {
    const int64_t groups = tile_->pair_at(block_);
    panel_ = first_;
    if (groups == kPair)
      return tile_->template open<C>(block_, C::quads * block_, kPair, block_ + kPair);
    if (groups > 0) tile_->template add<C>(block_, C::quads * block_, groups, p_.blocks);
    begin_ += kTile;
    if (!empty()) start();
  }

  const TernaryProduct& p_;
  const int64_t first_, last_;
  int64_t begin_;
  const int64_t end_;
  LookupScratch& scratch_;
  std::optional<LookupTile<Bytes512>> tile_;
  int64_t block_ = 0, panel_ = 0;
};

// A tile of dot products, and a lookup beside it while there are any.
template <class C>
struct MixedTile {
  LookupQueue<C>& lookups;
  template <int R>
  BITNET_INLINE void run(const uint8_t* codes, int64_t quads, const int8_t* q, int64_t q_stride,
                         bool fresh, int32_t* acc) {
    if (R < 6 || lookups.empty()) return Vnni512::tile<R>(codes, quads, q, q_stride, fresh, acc);
    const Lookup lookup = lookups.front();
    const int64_t done =
        tile6_and_lookup<C::entries>(codes, quads, q, q_stride, fresh, acc, lookup);
    lookups.pop(lookup, done);
  }
};

// 64 quads of 2 bits, 65 of 1.6: an output each.
struct Mixed512 : Vnni512 {
  static constexpr int step = 260;
};

struct MixedScratch {
  LookupScratch lookup;
  alignas(BITNET_LINE) char dots[gemm_scratch<Mixed512>];
};

template <class C>
void mixed_rows(const TernaryProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end,
                int64_t lookup_rows, MixedScratch& s) {
  LookupQueue<C> lookups(p, first, last, end - lookup_rows, end, s.lookup);
  for (int64_t panel = first; panel < last; ++panel)
    gemm_panel<Mixed512>(p, panel, begin, end - lookup_rows, s.dots, MixedTile<C>{lookups});
  while (!lookups.empty()) lookups.pop(lookups.front(), 0);
}

// Rows of a task that go by lookup: about as many lookups as tiles of dot products,
//   (rows - n) / 6 tiles of 64 quads = n / 32 tiles of two groups, 8 or 10 quads,
// so n = 32 rows / 80 or 32 rows / 71, in whole tiles. Where panels are few, tables cost more than
// they save.
inline int64_t lookup_rows_of(int64_t rows, int64_t panels) {
  constexpr int64_t tile_of = 72;
  return panels < 4 ? 0 : (rows + tile_of / 2) / tile_of * kTile;
}

void mixed_gemm(const TernaryProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end,
                void* scratch) {
  MixedScratch& s = *static_cast<MixedScratch*>(scratch);
  const int64_t lookup_rows = lookup_rows_of(end - begin, last - first);
  if (p.quads == 4)
    mixed_rows<FieldTables>(p, first, last, begin, end, lookup_rows, s);
  else
    mixed_rows<DigitTables>(p, first, last, begin, end, lookup_rows, s);
}

constexpr TernaryKernels mixed_table(const char* isa) {
  TernaryKernels t = table<Vnni512>(isa);
  t.gemm_rows = kMixedRows;
  t.gemm_panels = kLookupPanels;
  t.row_grain = 8;
  t.least_rows = 2 * kTile;
  t.gemm = mixed_gemm;
  t.gemm_scratch = sizeof(MixedScratch);
  return t;
}

}  // namespace
}  // namespace bitnet
