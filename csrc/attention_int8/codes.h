// A task's queries, and 64 keys and values at a time, as int8 codes in the order that the products
// read. Include a lanes header first.
#pragma once
#include "attention/dense_scores.h"
#include "attention_int8/attention_int8.h"

namespace bitnet {
namespace {

// Codes of a word of 32 bits along dk: four bytes, or two int16 where there is no product of bytes.
constexpr int32_t kWordCodes = kByteProducts ? 4 : 2;

// One block of keys and values and the task's queries, in scratch. A byte of a key is its code plus
// 128, the unsigned operand; 128 times the sum of the query's codes is subtracted again.
struct Codes {
  int32_t* keys;        // [4][words][16]
  int32_t* values;      // [32][wide_dv]: word 16 h + i is keys 32 h + i (low half) and + 16
  float* key_scales;    // [64]
  float* value_scales;  // [64]; 0 for those of `bad`
  int32_t* queries;     // [count][words]
  float* query_scales;  // [count]
  int32_t* query_sums;  // [count]: 128 times the sum of the codes
  int32_t wide_dk, wide_dv, words;
  uint64_t bad;  // keys whose values are not finite

  BITNET_INLINE Codes(const DenseTask& t, float* scratch)
      : wide_dk((t.dk + 15) / 16 * 16),
        wide_dv((t.dv + 15) / 16 * 16),
        words(wide_dk / kWordCodes),
        bad(0) {
    keys = reinterpret_cast<int32_t*>(scratch);
    values = keys + kPageTokens * words;
    key_scales = scratch + kPageTokens * words + kPageTokens / 2 * wide_dv;
    value_scales = key_scales + kPageTokens;
    queries = reinterpret_cast<int32_t*>(value_scales + kPageTokens);
    query_scales = value_scales + kPageTokens + int64_t(t.count) * words;
    query_sums = reinterpret_cast<int32_t*>(query_scales + t.count);
  }
};

struct Scales {
  float multiply[16], stored[16];
  uint32_t finite;
};

// Of sixteen vectors at(j), those from `rows` on zero; fetch(j, d) before each span is read.
template <class At, class Fetch>
BITNET_INLINE void find_scales(At at, int rows, int32_t width, Fetch fetch, Scales& to) {
  F16 top[16];  // bits of absolute values, as integers: in their order, NaN above infinity
  for (int j = 0; j < 16; ++j) {
    I16 largest = set1_int(0);
    if (j < rows)
      each_span(width, [&](int64_t d, auto span) {
        fetch(j, d);
        largest = max(largest, bits(abs(at(j).at(d, span))));
      });
    top[j] = from_bits(largest);
  }
  transpose(top);
  I16 largest = bits(top[0]);
  for (int i = 1; i < 16; ++i) largest = max(largest, bits(top[i]));
  const M16 finite = lt(from_bits(largest), set1(__builtin_inff()));
  const F16 a = max(from_bits(largest), set1(1e-30f)), levels = set1(127.0f);
  store(to.multiply, select(finite, div(levels, a), zero()));
  store(to.stored, select(finite, div(a, levels), set1(__builtin_nanf(""))));
  to.finite = mask_bits(finite);
}

// Low halves of words and their high halves.
BITNET_INLINE I16 pair_of(I16 low, I16 high) {
  return bit_or(bit_and(low, set1_int(0xffff)), shift_left<16>(high));
}

// Codes of a row, zero up to `wide`, in words: four next to each other, or those of elements u (low
// half) and u + wide / 2. Room for 16 words more. Returns lanes of their sum.
template <class Row>
BITNET_INLINE F16 store_codes(const Row& row, int32_t n, int32_t wide, float multiply,
                              int32_t* words) {
  const F16 factor = set1(multiply);
  F16 sum = zero();
  if constexpr (kByteProducts) {
    auto* bytes = reinterpret_cast<int8_t*>(words);
    each_span(n, [&](int64_t d, auto span) {
      const F16 code = rint(mul(row.at(d, span), factor));
      sum = add(sum, code);
      store_i8(bytes + d, code);
    });
    for (int32_t d = (n + 15) / 16 * 16; d < wide; d += 16) store_i8(bytes + d, zero());
  } else {
    alignas(64) int32_t codes[kMaxHeadDim + 16];
    each_span(n, [&](int64_t d, auto span) {
      const F16 code = rint(mul(row.at(d, span), factor));
      sum = add(sum, code);
      store_int(codes + d, to_int(code));
    });
    for (int32_t d = (n + 15) / 16 * 16; d < wide + 16; d += 16) store_int(codes + d, set1_int(0));
    for (int32_t u = 0; u < wide / 2; u += 16)
      store_int(words + u, pair_of(load_int(codes + u), load_int(codes + wide / 2 + u)));
  }
  return sum;
}

void code_queries(const DenseTask& t, Codes& to) {
  with_rows(t.q.data, t.q.dtype, 1, [&](auto row) {
    for (int32_t first = 0; first < t.count; first += 16) {
      const int rows = t.count - first < 16 ? t.count - first : 16;
      const auto at = [&](int j) {
        const Vector v = vector_at(t, first + j);
        return row(v.row * t.q.stride + v.head * t.q.head_stride);
      };
      Scales scales;
      find_scales(at, rows, t.dk, [](int, int64_t) {}, scales);
      for (int j = 0; j < rows; ++j) {
        alignas(64) int32_t words[kMaxHeadDim / 2 + 16];
        const F16 sum = store_codes(at(j), t.dk, to.wide_dk, scales.multiply[j], words);
        const int32_t i = first + j;
        for (int32_t u = 0; u < to.words; ++u) to.queries[int64_t(i) * to.words + u] = words[u];
        to.query_sums[i] = 128 * int32_t(reduce_add(sum));
        to.query_scales[i] = scales.stored[j];
      }
    }
  });
}

// Keys [start, start + n), n <= 64.
void code_keys(const DenseTask& t, int64_t start, int n, const Ahead& ahead, Codes& to) {
  const I16 flip = set1_int(kByteProducts ? int32_t(0x80808080u) : 0);
  with_rows(t.k.data, t.k.dtype, t.k.stride, [&](auto row) {
    for (int tile = 0; tile < kPageTiles; ++tile) {
      const int first = 16 * tile, rows = tile_lanes(n, tile);
      const auto at = [&](int j) { return row(start + first + j); };
      Scales scales;
      find_scales(
          at, rows, t.dk, [&](int j, int64_t d) { ahead.keys.fetch(first + j, d); }, scales);
      store(to.key_scales + first, load(scales.stored));
      alignas(64) int32_t words[16][kMaxHeadDim / kWordCodes + 16];
      for (int j = 0; j < rows; ++j)
        store_codes(at(j), t.dk, to.wide_dk, scales.multiply[j], words[j]);
      int32_t* keys = to.keys + int64_t(first) * to.words;
      each_span(to.words, [&](int64_t u, auto span) {
        F16 x[16];  // bits
        for (int j = 0; j < 16; ++j) x[j] = j < rows ? from_bits(load_int(words[j] + u)) : zero();
        transpose(x);
        for (int i = 0; i < width_of(span); ++i)
          store_int(keys + (u + i) * 16, bit_xor(bits(x[i]), flip));
      });
    }
  });
}

// Values of the same keys, two rows to a word.
void code_values(const DenseTask& t, int64_t start, int n, const Ahead& ahead, Codes& to) {
  to.bad = 0;
  with_rows(t.v.data, t.v.dtype, t.v.stride, [&](auto row) {
    for (int half = 0; half < 2; ++half) {
      Scales scales[2];
      for (int i = 0; i < 2; ++i) {
        const int tile = 2 * half + i, first = 16 * tile;
        find_scales([&](int j) { return row(start + first + j); }, tile_lanes(n, tile), t.dv,
                    [&](int j, int64_t d) { ahead.values.fetch(first + j, d); }, scales[i]);
        const M16 finite = mask_of(scales[i].finite);
        store(to.value_scales + first, select(finite, load(scales[i].stored), zero()));
        to.bad |= uint64_t(~scales[i].finite & 0xffffu) << first;
      }
      for (int j = 0; j < 16; ++j) {
        const int low = 32 * half + j, high = low + 16;
        int32_t* words = to.values + int64_t(16 * half + j) * to.wide_dv;
        const F16 factors[] = {set1(scales[0].multiply[j]), set1(scales[1].multiply[j])};
        each_span(t.dv, [&](int64_t d, auto span) {
          const F16 a = low < n ? row(start + low).at(d, span) : zero();
          const F16 b = high < n ? row(start + high).at(d, span) : zero();
          store_int(words + d, pair_of(to_int(mul(a, factors[0])), to_int(mul(b, factors[1]))));
        });
      }
    }
  });
}

}  // namespace
}  // namespace bitnet
