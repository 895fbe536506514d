// Products by table lookup across 32 rows of q at once, for ISAs whose integer dot product is slow.
//
// A group is one output, one j and g = 4 or 5 quads in a row: weights of k = 4t + j.  For each
// group of quads and j there are 3^g combinations e of weights; with
//
//   table[j][e][m] = sum_t w_t(e) q[m, 4t + j]      int16, the 32 rows m of a tile side by side
//
// every output needs one vector add for g weights of all rows:  y[o][m] += table[j][e(o, j)][m].
// An entry takes one add of two smaller sums, so that tables cost little where outputs are many.
//
// A packed byte of 1.6 bits is a group of five, one of 2 bits a group of four: the byte itself says
// which entry.  With vectors of 64 bytes five blocks of 2 bits, 20 quads, are taken as four groups
// of five, whose entries are numbered in base 3.
//
// |entry| <= 128 g, so int16 holds the entries of 240 k (128 * 240 = 30720); then the sums are
// added to int32.
#pragma once
#include <immintrin.h>

#include "ternary/fused.h"

namespace bitnet {
namespace {

constexpr int kTile = 32;          // rows of q: an entry is one cache line
constexpr int kLookupPanels = 48;  // most panels of one task: their sums stay in L2
constexpr int kMostEntries = 256;  // of a table
constexpr int kPair = 2;           // groups of quads whose tables are read together
constexpr int kLookupQuads = 5;    // most quads of a group
constexpr int kNarrowK = 240;      // k that int16 sums hold
constexpr int kFives = 5;          // blocks of 2 bits that are four groups of five quads
static_assert(kNarrowK * 128 <= 32767);

struct LookupScratch {
  alignas(BITNET_LINE) int16_t tables[kPair * 4 * kMostEntries * kTile];
  alignas(BITNET_LINE) int16_t columns[kLookupQuads * 4 * kTile];  // [k of a group][m]
  alignas(BITNET_LINE) uint8_t index[kPair * kBlockBytes];
  alignas(BITNET_LINE) int32_t turned[kTile * kPanel];                  // [m][o]
  alignas(BITNET_LINE) int16_t narrow[kLookupPanels * kPanel * kTile];  // [panel][o][m]
  alignas(BITNET_LINE) int32_t wide[kLookupPanels * kPanel * kTile];
};

// Half a byte holds two codes, c0 + 4 c1: what they add to a number in base 3.
struct Half {
  alignas(16) uint8_t sums[16] = {};
  constexpr Half(int w0, int w1) {
    for (int c0 = 0; c0 < 3; ++c0)
      for (int c1 = 0; c1 < 3; ++c1) sums[c0 + 4 * c1] = uint8_t(w0 * c0 + w1 * c1);
  }
  template <class V>
  BITNET_INLINE typename V::type of(typename V::type halves) const {
    return V::shuffle8(V::load_lanes(sums), halves);
  }
};

// Half n of the bytes at `packed` + 256 (n / 2).
template <class V, int n>
BITNET_INLINE typename V::type half_of(const uint8_t* packed) {
  const auto v = V::load(packed + n / 2 * kBlockBytes);
  return V::bit_and(n % 2 ? V::template shift<4>(v) : v, V::set1(15));
}

// Four digits as a number in base 3, the first most significant -> as a byte, the first lowest.
struct FieldBytes {
  uint8_t of[81] = {};
  constexpr FieldBytes() {
    for (int n = 0; n < 81; ++n)
      of[n] = uint8_t(n / 27 + 4 * (n / 9 % 3) + 16 * (n / 3 % 3) + 64 * (n % 3));
  }
};

// Four quads of 2 bits: the byte itself, so that of 171 entries 81 are used.  Tables stand further
// apart than that, for all lines of a pair's to fall evenly on the 64 sets of a first-level cache.
struct FieldTables {
  static constexpr int quads = 4, entries = 217;
  static BITNET_INLINE int entry(int digits) { return kFields.of[digits]; }
  static BITNET_INLINE const uint8_t* index(const uint8_t* packed, uint8_t*) { return packed; }
  static constexpr FieldBytes kFields{};
};

// Five quads of 2 bits: groups 2 H and 2 H + 1 of kFives blocks, in halves 5 H to 5 H + 4.
template <class V, int H>
struct FiveTables {
  static constexpr int quads = 5, entries = 243;
  static BITNET_INLINE int entry(int digits) { return digits; }
  static BITNET_INLINE const uint8_t* index(const uint8_t* packed, uint8_t* to) {
    for (int64_t i = 0; i < kBlockBytes; i += V::bytes) {
      const auto shared = half_of<V, 5 * H + 2>(packed + i);
      const auto first = V::add8(kTwo.of<V>(half_of<V, 5 * H>(packed + i)),
                                 kFour.of<V>(half_of<V, 5 * H + 1>(packed + i)));
      const auto second = V::add8(kThree.of<V>(half_of<V, 5 * H + 3>(packed + i)),
                                  kFive.of<V>(half_of<V, 5 * H + 4>(packed + i)));
      V::store(to + i, V::add8(first, kLast.of<V>(shared)));
      V::store(to + kBlockBytes + i, V::add8(second, kOne.of<V>(shared)));
    }
    return to;
  }
  // By where a half ends in its group.
  static constexpr Half kOne{0, 81}, kTwo{81, 27}, kThree{27, 9}, kFour{9, 3}, kFive{3, 1},
      kLast{1, 0};
};

// Five quads of 1.6 bits: the byte itself.
struct DigitTables {
  static constexpr int quads = 5, entries = 256;
  static BITNET_INLINE int entry(int digits) { return (256 * digits + 242) / 243; }
  static BITNET_INLINE const uint8_t* index(const uint8_t* packed, uint8_t*) { return packed; }
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

typedef int32_t Quads __attribute__((vector_size(64)));
typedef int16_t Column __attribute__((vector_size(32)));

// Values of one group: columns[k][m] = q[m][k], the last row repeated in the place of absent ones.
inline void turn_group(const int8_t* q, int64_t q_stride, int64_t rows, int quads,
                       int16_t* columns) {
  for (int t = 0; t < quads; ++t, columns += 4 * kTile)
    for (int half = 0; half < kTile; half += 16) {
      Quads quad;
      for (int i = 0; i < 16; ++i) {
        const int64_t m = half + i < rows ? half + i : rows - 1;
        quad[i] = quad_at(q + m * q_stride + 4 * t);
      }
      for (int j = 0; j < 4; ++j) {
        const Column values = __builtin_convertvector(quad << (24 - 8 * j) >> 24, Column);
        __builtin_memcpy(columns + j * kTile + half, &values, sizeof values);
      }
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

// The four tables of a group.
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

// Entry number byte j of `word`, whose bytes one shift finds: four numbers come in one load.
template <class V, int j>
BITNET_INLINE Row<V> entry_of(const int16_t* table, uint32_t word) {
  constexpr int size = 2 * kTile, shift = 8 * j - 6;
  static_assert(size == 1 << 6);
  const uint32_t moved = shift < 0 ? word << (-shift & 31) : word >> (shift & 31);
  const char* entry = reinterpret_cast<const char*>(table) + (moved & 0xffu * size);
  return Row<V>::load(reinterpret_cast<const int16_t*>(entry));
}

// acc[o][m] (+)= the entries of outputs, those of a panel, in the tables of `Groups` groups.
template <class V, class C, int Groups>
BITNET_INLINE void add_entries(const uint8_t* index, const int16_t* tables, bool fresh,
                               int16_t* acc, int64_t outputs = kPanel) {
  for (int64_t o = 0; o < outputs; ++o, index += 4, acc += kTile) {
    Row<V> sum = fresh ? Row<V>::zero() : Row<V>::load(acc);
    each<Groups>([&]<int g>() BITNET_LAMBDA {
      uint32_t word;
      __builtin_memcpy(&word, index + g * kBlockBytes, 4);
      __asm__("" : "+r"(word));  // else GCC 12 loads it again for each byte
      each<4>([&]<int j>() BITNET_LAMBDA {
        sum = sum.add(entry_of<V, j>(tables + (g * 4 + j) * C::entries * kTile, word));
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

// Rows begin..end-1, at most kTile, of panels first..last-1, at most kLookupPanels, over k in
// ascending order: tables of one or two groups at a time, with which every panel's sums grow.
template <class V>
class LookupTile {
 public:
  LookupTile(const TernaryProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end,
             LookupScratch& s)
      : p_(p), first_(first), last_(last), begin_(begin), end_(end), s_(s) {}

  void run() {
    int64_t b = 0;
    if (p_.quads == 5) {
      for (; b < p_.blocks; b += kPair) add<DigitTables>(b, 5 * b, pair_at(b), b + kPair);
      return;
    }
    for (; kTakesFives && b + kFives <= p_.blocks; b += kFives) {
      add<FiveTables<V, 0>>(b, 4 * b, kPair, b);
      add<FiveTables<V, 1>>(b, 4 * b + 10, kPair, b + kFives);
    }
    for (; b < p_.blocks; b += kPair) add<FieldTables>(b, 4 * b, pair_at(b), b + kPair);
  }

  int64_t pair_at(int64_t b) const { return p_.blocks - b < kPair ? p_.blocks - b : kPair; }

  // `groups` groups of quads from `quad` on, whose codes begin in block b; all is added where
  // blocks below `done` are.
  template <class C>
  void add(int64_t b, int64_t quad, int64_t groups, int64_t done) {
    open<C>(b, quad, groups, done);
    for (int64_t panel = first_; panel < last_; ++panel) {
      const uint8_t* index = C::index(packed(panel), s_.index);
      with_count<kPair>(groups, [&]<int Groups> {
        add_entries<V, C, Groups>(index, s_.tables, fresh_, narrow(panel));
      });
      close(panel);
    }
  }

  // The steps of add: tables; then of each panel the packed bytes, whose entries are added to its
  // sums (or begin them); then what becomes of those.
  template <class C>
  void open(int64_t b, int64_t quad, int64_t groups, int64_t done) {
    for (int64_t i = 0; i < groups; ++i) {
      const int8_t* q = p_.q + begin_ * p_.q_stride + 4 * (quad + i * C::quads);
      turn_group(q, p_.q_stride, end_ - begin_, C::quads, s_.columns);
      build_tables<V, C>(s_.columns, s_.tables + i * 4 * C::entries * kTile);
    }
    if (full_) pending_ = 0, fresh_wide_ = false;
    block_ = b, fresh_ = pending_ == 0, over_ = done >= p_.blocks;
    pending_ += groups * 4 * C::quads;
    full_ = over_ || pending_ + kPair * 4 * kLookupQuads > kNarrowK;
  }
  const uint8_t* packed(int64_t panel) const {
    const int64_t panel_bytes = p_.blocks * kBlockBytes;
    const uint8_t* bytes = p_.panels + panel * panel_bytes + block_ * kBlockBytes;
    for (int line = 0; line < kPair * kBlockBytes && panel + 2 < last_; line += BITNET_LINE)
      _mm_prefetch(reinterpret_cast<const char*>(bytes) + 2 * panel_bytes + line, _MM_HINT_T0);
    return bytes;
  }
  int16_t* narrow(int64_t panel) const { return s_.narrow + (panel - first_) * kPanel * kTile; }
  bool fresh() const { return fresh_; }
  void close(int64_t panel) {
    int32_t* wide = s_.wide + (panel - first_) * kPanel * kTile;
    if (full_) widen_panel<V>(narrow(panel), fresh_wide_, wide);
    if (over_) finish_tile(p_, panel, begin_, end_, wide, s_.turned);
  }

 private:
  // Tables of five leave the first-level cache: worth a fifth of the adds where an entry is one
  // load, not where it is two.
  static constexpr bool kTakesFives = V::bytes == BITNET_LINE;

  const TernaryProduct& p_;
  const int64_t first_, last_, begin_, end_;
  LookupScratch& s_;
  int64_t block_ = 0;
  int64_t pending_ = 0;     // k in the int16 sums
  bool fresh_ = true;       // they begin with these tables
  bool full_ = false;       // they are added to int32 after these
  bool fresh_wide_ = true;  // for the first time
  bool over_ = false;       // and are all there is
};

// Rows begin..end-1 of panels first..last-1: tables cost as much as lookups in two panels.
template <class V, class I>
void lookup_gemm(const TernaryProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end,
                 void* scratch) {
  const bool tables_pay = end - begin > I::gemv_rows && last - first > 2;
  if (!tables_pay) return gemv<I>(rows_of(p, begin, end), first, last);
  LookupTile<V>(p, first, last, begin, end, *static_cast<LookupScratch*>(scratch)).run();
}

}  // namespace
}  // namespace bitnet
