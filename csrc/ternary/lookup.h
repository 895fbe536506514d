// Products by table lookup across 32 rows of q at once, for ISAs whose integer dot product is slow.
//
// A packed byte stands for one output and g = 4 or 5 weights, of k = 4t + j for the quads t < g of
// its block and one j.  For each block and j there are 3^g such combinations e; with
//
//   table[j][e][m] = sum_t w_t(e) q[m, 4t + j]      int16, the 32 rows m of a tile side by side
//
// every output needs one vector add for g weights of all rows:  y[o][m] += table[j][e(o, j)][m].
// An entry takes one add of two smaller sums, so that tables cost little where outputs are many.
//
// |entry| <= 128 g, so int16 holds the 4 entries each of 15 blocks (2 bits, 4 * 512 * 15 = 30720)
// or 12 (1.6 bits, 4 * 640 * 12 = 30720); then the sums are added to int32.
#pragma once
#include <immintrin.h>

#include "ternary/fused.h"

namespace bitnet {
namespace {

constexpr int kTile = 32;          // rows of q: an entry is one cache line
constexpr int kLookupPanels = 48;  // most panels of one task: their sums stay in L2
constexpr int kMostEntries = 256;  // of a table
constexpr int kPair = 2;           // blocks whose tables are read together
constexpr int kLookupQuads = 5;    // most quads of a block

struct LookupScratch {
  alignas(BITNET_LINE) int16_t tables[kPair * 4 * kMostEntries * kTile];
  alignas(BITNET_LINE) int16_t columns[kLookupQuads * 4 * kTile];  // [k of a block][m]
  alignas(BITNET_LINE) uint8_t index[kPair * kBlockBytes];
  alignas(BITNET_LINE) int32_t turned[kTile * kPanel];                  // [m][o]
  alignas(BITNET_LINE) int16_t narrow[kLookupPanels * kPanel * kTile];  // [panel][o][m]
  alignas(BITNET_LINE) int32_t wide[kLookupPanels * kPanel * kTile];
};

// Which entry a byte means.  2 bits: its digits in base 3, quad 0 first, 27 c0 + 9 c1 by the byte's
// low half c0 + 4 c1, 3 c2 + c3 by its high half.
template <class V>
struct FieldTables {
  static constexpr int quads = 4, entries = 81, most_blocks = 15;
  static_assert(most_blocks * 4 * quads * 128 <= 32767);
  static BITNET_INLINE int entry(int digits) { return digits; }
  static BITNET_INLINE const uint8_t* index(const uint8_t* packed, int64_t bytes, uint8_t* to) {
    const auto half = V::set1(15);
    const auto first = V::load_lanes(kFirst), second = V::load_lanes(kSecond);
    for (int64_t i = 0; i < bytes; i += V::bytes) {
      const auto v = V::load(packed + i);
      const auto low = V::shuffle8(first, V::bit_and(v, half));
      const auto high = V::shuffle8(second, V::bit_and(V::template shift<4>(v), half));
      V::store(to + i, V::add8(low, high));
    }
    return to;
  }
  static constexpr uint8_t kFirst[16] = {0, 27, 54, 0, 9, 36, 63, 0, 18, 45, 72};
  static constexpr uint8_t kSecond[16] = {0, 3, 6, 0, 1, 4, 7, 0, 2, 5, 8};
};

// 1.6 bits: the byte itself.
struct DigitTables {
  static constexpr int quads = 5, entries = 256, most_blocks = 12;
  static_assert(most_blocks * 4 * quads * 128 <= 32767);
  static BITNET_INLINE int entry(int digits) { return (256 * digits + 242) / 243; }
  static BITNET_INLINE const uint8_t* index(const uint8_t* packed, int64_t, uint8_t*) {
    return packed;
  }
};

// One entry: 32 int16 in as many vectors as it takes.
template <class V>
struct Row {
  static constexpr int n = kTile * 2 / V::bytes;
  typename V::type v[n];
  static BITNET_INLINE Row zero() {
    Row r;
    each<n>([&]<int h>() BITNET_LAMBDA { r.v[h] = V::zero(); });
    return r;
  }
  static BITNET_INLINE Row load(const int16_t* p) {
    Row r;
    each<n>([&]<int h>() BITNET_LAMBDA { r.v[h] = V::load(p + h * V::bytes / 2); });
    return r;
  }
  BITNET_INLINE void store(int16_t* p) const {
    each<n>([&]<int h>() BITNET_LAMBDA { V::store(p + h * V::bytes / 2, v[h]); });
  }
  BITNET_INLINE Row add(Row b) const {
    each<n>([&]<int h>() BITNET_LAMBDA { b.v[h] = V::add16(v[h], b.v[h]); });
    return b;
  }
  BITNET_INLINE Row less(Row b) const {
    each<n>([&]<int h>() BITNET_LAMBDA { b.v[h] = V::sub16(v[h], b.v[h]); });
    return b;
  }
};

// Values of one block: columns[k][m] = q[m][k], the last row repeated in the place of absent ones.
inline void turn_block(const int8_t* q, int64_t q_stride, int64_t rows, int quads,
                       int16_t* columns) {
  for (int t = 0; t < quads; ++t) {
    int32_t quad[kTile];
    for (int m = 0; m < kTile; ++m)
      quad[m] = quad_at(q + (m < rows ? m : rows - 1) * q_stride + 4 * t);
    for (int j = 0; j < 4; ++j)
      for (int m = 0; m < kTile; ++m) columns[(4 * t + j) * kTile + m] = int8_t(quad[m] >> 8 * j);
  }
}

// sums[e] = sum_i w_i(e) x[i], w_i = digit i of e less 1, digit 0 most significant; x 4 columns
// apart.
template <class V, int Digits>
BITNET_INLINE void every_sum(const int16_t* x, int16_t* sums) {
  Row<V>::zero().store(sums);
  int count = 1;
  for (int i = 0; i < Digits; ++i, count *= 3) {
    const Row<V> term = Row<V>::load(x + i * 4 * kTile);
    for (int e = count - 1; e >= 0; --e) {
      const Row<V> sum = Row<V>::load(sums + e * kTile);
      sum.add(term).store(sums + (3 * e + 2) * kTile);
      sum.store(sums + (3 * e + 1) * kTile);
      sum.less(term).store(sums + 3 * e * kTile);
    }
  }
}

// The four tables of a block.
template <class V, class C>
void build_tables(const int16_t* columns, int16_t* tables) {
  constexpr int most = C::quads == 4 ? 9 : 27;  // combinations of all digits but two
  alignas(BITNET_LINE) int16_t high[27 * kTile], low[9 * kTile];
  for (int j = 0; j < 4; ++j, tables += C::entries * kTile) {
    every_sum<V, C::quads - 2>(columns + j * kTile, high);
    every_sum<V, 2>(columns + ((C::quads - 2) * 4 + j) * kTile, low);
    for (int h = 0; h < most; ++h) {
      const Row<V> sum = Row<V>::load(high + h * kTile);
      for (int l = 0; l < 9; ++l)
        sum.add(Row<V>::load(low + l * kTile)).store(tables + C::entry(9 * h + l) * kTile);
    }
  }
}

// acc[o][m] (+)= the entries of every output of a panel in the tables of `Blocks` blocks.
template <class V, class C, int Blocks>
BITNET_INLINE void add_entries(const uint8_t* index, const int16_t* tables, bool fresh,
                               int16_t* acc) {
  for (int o = 0; o < kPanel; ++o, index += 4, acc += kTile) {
    Row<V> sum = fresh ? Row<V>::zero() : Row<V>::load(acc);
    each<Blocks>([&]<int b>() BITNET_LAMBDA {
      each<4>([&]<int j>() BITNET_LAMBDA {
        const int64_t entry = (b * 4 + j) * C::entries + index[b * kBlockBytes + j];
        sum = sum.add(Row<V>::load(tables + entry * kTile));
      });
    });
    sum.store(acc);
  }
}

// int16 sums of a panel -> int32.
template <class V>
void widen_panel(const int16_t* narrow, bool fresh, int32_t* wide) {
  constexpr int lanes = V::bytes / 4;
  for (int i = 0; i < kPanel * kTile; i += lanes) {
    const auto sum = V::widen16(narrow + i);
    V::store(wide + i, fresh ? sum : V::add32(V::load(wide + i), sum));
  }
}

// to[j][i] = from[i][j], 8 x 8.
BITNET_INLINE void turn8(const int32_t* from, int64_t from_stride, int32_t* to, int64_t to_stride) {
  __m256i a[8], b[8];
  each<8>([&]<int i>() BITNET_LAMBDA {
    a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * from_stride));
  });
  each<4>([&]<int i>() BITNET_LAMBDA {
    b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  });
  each<2>([&]<int i>() BITNET_LAMBDA {
    a[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  });
  each<4>([&]<int i>() BITNET_LAMBDA {
    const __m256i low = _mm256_permute2x128_si256(a[i], a[4 + i], 0x20);
    const __m256i high = _mm256_permute2x128_si256(a[i], a[4 + i], 0x31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * to_stride), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (4 + i) * to_stride), high);
  });
}

// Sums of a panel -> the caller's rows begin..end-1.
inline void finish_tile(const TernaryProduct& p, int64_t panel, int64_t begin, int64_t end,
                        const int32_t* wide, int32_t* turned) {
  for (int o = 0; o < kPanel; o += 8)
    for (int m = 0; m < kTile; m += 8)
      turn8(wide + o * kTile + m, kTile, turned + m * kPanel + o, kPanel);
  for (int64_t m = begin; m < end; ++m) finish(p, m, panel, turned + (m - begin) * kPanel, 0);
}

// Rows begin..end-1, at most kTile, of panels first..last-1, at most kLookupPanels.
template <class V, class C>
void lookup_tile(const TernaryProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end,
                 LookupScratch& s) {
  const int64_t panel_bytes = p.blocks * kBlockBytes;
  int64_t pending = 0;  // blocks in the int16 sums
  bool fresh_wide = true;
  for (int64_t b = 0; b < p.blocks; b += kPair) {
    const int64_t blocks = p.blocks - b < kPair ? p.blocks - b : int64_t(kPair);
    for (int64_t i = 0; i < blocks; ++i) {
      const int8_t* q = p.q + begin * p.q_stride + (b + i) * 4 * C::quads;
      turn_block(q, p.q_stride, end - begin, C::quads, s.columns);
      build_tables<V, C>(s.columns, s.tables + i * 4 * C::entries * kTile);
    }
    const bool fresh = pending == 0, over = b + kPair >= p.blocks;
    pending += blocks;
    const bool full = over || pending + kPair > C::most_blocks;
    for (int64_t panel = first; panel < last; ++panel) {
      const uint8_t* packed = p.panels + panel * panel_bytes + b * kBlockBytes;
      for (int line = 0; line < kPair * kBlockBytes && panel + 2 < last; line += BITNET_LINE)
        _mm_prefetch(reinterpret_cast<const char*>(packed) + 2 * panel_bytes + line, _MM_HINT_T0);
      int16_t* narrow = s.narrow + (panel - first) * kPanel * kTile;
      int32_t* wide = s.wide + (panel - first) * kPanel * kTile;
      const uint8_t* index = C::index(packed, blocks * kBlockBytes, s.index);
      with_count<kPair>(
          blocks, [&]<int Blocks> { add_entries<V, C, Blocks>(index, s.tables, fresh, narrow); });
      if (full) widen_panel<V>(narrow, fresh_wide, wide);
      if (over) finish_tile(p, panel, begin, end, wide, s.turned);
    }
    if (full) pending = 0, fresh_wide = false;
  }
}

// Rows begin..end-1 of panels first..last-1: tables cost as much as lookups in two panels.
template <class V, class I>
void lookup_gemm(const TernaryProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end,
                 void* scratch) {
  const bool tables_pay = end - begin > I::gemv_rows && last - first > 2;
  if (!tables_pay) return gemv<I>(rows_of(p, begin, end), first, last);
  LookupScratch& s = *static_cast<LookupScratch*>(scratch);
  if (p.quads == 4)
    lookup_tile<V, FieldTables<V>>(p, first, last, begin, end, s);
  else
    lookup_tile<V, DigitTables>(p, first, last, begin, end, s);
}

}  // namespace
}  // namespace bitnet
