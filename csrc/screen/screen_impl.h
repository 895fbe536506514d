// The screen's kernels over sixteen float lanes and an ISA's integer dot product; included once by
// each ISA's file, after its lanes header.  `Dot` has
//   Bytes      a vector of `bytes` unsigned bytes
//   Sums       a vector of int32 partial sums
//   lines      lines of 64 bytes that fit the registers
//   load, low_half, high_half (of each byte), zero, total
//   add(sums, nibbles, x)   sums += nibbles . x, `bytes` signed bytes
#pragma once
#include "base/spans.h"
#include "screen/screen.h"

namespace bitnet {
namespace {

// --- the copy ---------------------------------------------------------------------------------
// Bytes out of lanes that hold 0..255.
BITNET_INLINE void store_bytes(uint8_t* p, I16 a) {
  store_i8(reinterpret_cast<int8_t*>(p), to_float(shift_right<24>(shift_left<24>(a))));
}

template <class Row>
void pack_row(const Row& row, const ScreenTable& t, int64_t v) {
  I16 top = set1_int(0);
  each_span(t.width, [&](int64_t i, auto span) { top = max(top, bits(abs(row.at(i, span)))); });
  const float most = as_float(reduce_max(top));
  float scale = most < 0x1p-100f ? 0.0f : most / 127.0f;
  if (!(most <= 0x1.fffffep127f)) scale = __builtin_nanf("");
  const F16 divisor = set1(scale == 0.0f ? __builtin_inff() : scale);

  F16 squares_high = zero(), squares_low = zero();
  // Codes of 16 elements; those past the width stand for 0 and count no error.
  const auto codes = [&](int64_t i) {
    I16 c = set1_int(128);
    const auto take = [&](auto span) {
      const F16 quotient = div(row.at(i, span), divisor);
      const I16 q = to_int(quotient);
      c = add(q, set1_int(128));
      const F16 low = sub(quotient, to_float(q));
      const F16 middle = fma(to_float(shift_right<4>(c)), set1(16.0f), set1(-120.5f));
      const F16 high = keep(sub(quotient, middle), zero(), span);
      squares_low = fma(low, low, squares_low);
      squares_high = fma(high, high, squares_high);
    };
    if (i + 16 <= t.width)
      take(Whole{});
    else if (i < t.width)
      take(Part{int(t.width - i)});
    return c;
  };
  for (int64_t at = 0; at < t.row_bytes; at += 64)
    for (int64_t j = 0; j < 64; j += 16) {
      const I16 first = codes(2 * at + j), second = codes(2 * at + 64 + j);
      const I16 nibble = set1_int(15), upper = set1_int(0xf0);
      const int64_t to = v * t.row_bytes + at + j;
      store_bytes(t.high + to, bit_or(shift_right<4>(first), bit_and(second, upper)));
      store_bytes(t.low + to,
                  bit_or(bit_and(first, nibble), shift_left<4>(bit_and(second, nibble))));
    }
  // Each difference is off by less than 2^-16, their sum by (width / 16 + 5) 2^-24 of itself.
  const float growth = 1.0f + float(t.width / 16 + 16) * 0x1p-23f;
  const float off = __builtin_sqrtf(float(t.width)) * 0x1p-16f;
  t.scale[v] = scale;
  t.error_high[v] = __builtin_sqrtf(reduce_add(squares_high)) * growth + off;
  t.error_low[v] = __builtin_sqrtf(reduce_add(squares_low)) * growth + off;
}

void pack(const void* table, Dtype dtype, int64_t stride, const ScreenTable& t, int64_t begin,
          int64_t end) {
  with_rows(table, dtype, stride, [&](auto row_at) {
    for (int64_t v = begin; v < end; ++v) pack_row(row_at(v), t, v);
  });
}

// --- bounds -----------------------------------------------------------------------------------
// Partial sums of one row of a plane: of the low and high halves of its bytes, with a and with b.
template <class Dot>
struct PlaneSums {
  decltype(Dot::zero()) low_a = Dot::zero(), high_a = low_a, low_b = low_a, high_b = low_a;
};

// Adds `Lines` lines of 64 bytes.  They are loaded together before any is used, one row at a time
// and without prefetches: so a Zen 4 reads as fast as it can, and at half of that with prefetches
// or with two rows at once.
template <class Dot, int Lines>
BITNET_INLINE void add_lines(const uint8_t* row, const ScreenQuery& q, int64_t at,
                             PlaneSums<Dot>& sums) {
  constexpr int parts = Lines * 64 / Dot::bytes;
  decltype(Dot::load(row)) codes[parts];
#pragma GCC unroll 32
  for (int i = 0; i < parts; ++i) codes[i] = Dot::load(row + at + i * Dot::bytes);
#pragma GCC unroll 32
  for (int i = 0; i < parts; ++i) {
    const int64_t byte = i * Dot::bytes, x = 2 * at + byte / 64 * 128 + byte % 64;
    const auto low = Dot::low_half(codes[i]), high = Dot::high_half(codes[i]);
    sums.low_a = Dot::add(sums.low_a, low, q.coarse + x);
    sums.low_b = Dot::add(sums.low_b, low, q.fine + x);
    sums.high_a = Dot::add(sums.high_a, high, q.coarse + x + 64);
    sums.high_b = Dot::add(sums.high_b, high, q.fine + x + 64);
  }
}

// sum nibbles X of one row of a plane = 256 coarse + fine.
template <class Dot>
BITNET_INLINE void plane_sums(const uint8_t* row, int64_t row_bytes, const ScreenQuery& q,
                              int32_t& coarse, int32_t& fine) {
  PlaneSums<Dot> sums;
  int64_t at = 0;
  for (; at + 64 * Dot::lines <= row_bytes; at += 64 * Dot::lines)
    add_lines<Dot, Dot::lines>(row, q, at, sums);
  for (; at < row_bytes; at += 64) add_lines<Dot, 1>(row, q, at, sums);
  coarse = Dot::total(sums.low_a) + Dot::total(sums.high_a);
  fine = Dot::total(sums.low_b) + Dot::total(sums.high_b);
}

// Up to 16 rows of the table at a time: their terms of the bound side by side.
struct Group {
  int32_t coarse[16], fine[16];
  float scale[16], error[16], bias[16], high[16], lower[16], upper[16];
};

BITNET_INLINE F16 whole_sum(const Group& g, int32_t coarse_less, int32_t fine_less) {
  const I16 coarse = sub(load_int(g.coarse), set1_int(coarse_less));
  const I16 fine = sub(load_int(g.fine), set1_int(fine_less));
  return fma(to_float(coarse), set1(256.0f), to_float(fine));
}

BITNET_INLINE void bound(Group& g, F16 sum, float step, float slack, const ScreenQuery& q) {
  const F16 scale = load(g.scale), bias = load(g.bias);
  const F16 estimate = add(mul(mul(scale, set1(step)), sum), bias);
  const F16 rounding = fma(load(g.error), set1(q.rest), set1(slack));
  const F16 reach = fma(scale, rounding, fma(abs(bias), set1(0x1p-22f), set1(q.floor)));
  store(g.lower, sub(estimate, reach));
  store(g.upper, add(estimate, reach));
}

// Rows row_at(0..count-1) of a plane, 16 at a time.
template <class Dot, bool High, class RowAt>
BITNET_INLINE void screen(const ScreenTable& t, const ScreenQuery& q, const float* bias,
                          int64_t count, const ScreenBounds& bounds, RowAt row_at) {
  const uint8_t* plane = High ? t.high : t.low;
  const float* error = High ? t.error_high : t.error_low;
  Group g = {};
  for (int64_t begin = 0; begin < count; begin += 16) {
    const int64_t n = count - begin < 16 ? count - begin : 16;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t v = row_at(begin + j);
      plane_sums<Dot>(plane + v * t.row_bytes, t.row_bytes, q, g.coarse[j], g.fine[j]);
      g.scale[j] = t.scale[v];
      g.error[j] = error[v];
      g.bias[j] = bias ? bias[v] : 0.0f;
      if (!High) g.high[j] = bounds.high[v];
    }
    if (High) {
      const F16 sum = whole_sum(g, q.coarse_sum, q.fine_sum);
      store(g.high, sum);
      bound(g, add(sum, set1(q.middle)), 16.0f * q.step, q.slack_high, q);
    } else {
      bound(g, fma(load(g.high), set1(16.0f), whole_sum(g, 0, 0)), q.step, q.slack_low, q);
    }
    for (int64_t j = 0; j < n; ++j) {
      const int64_t v = row_at(begin + j);
      bounds.high[v] = g.high[j];
      bounds.lower[v] = g.lower[j];
      bounds.upper[v] = g.upper[j];
    }
  }
}

template <class Dot>
void screen_high(const ScreenTable& t, const ScreenQuery& q, const float* bias, int64_t begin,
                 int64_t end, const ScreenBounds& bounds) {
  screen<Dot, true>(t, q, bias, end - begin, bounds, [=](int64_t i) { return begin + i; });
}

template <class Dot>
void screen_low(const ScreenTable& t, const ScreenQuery& q, const float* bias, const int32_t* rows,
                int64_t count, const ScreenBounds& bounds) {
  screen<Dot, false>(t, q, bias, count, bounds, [=](int64_t i) { return int64_t(rows[i]); });
}

int64_t survivors(const float* upper, int64_t n, float least, int32_t* rows) {
  int64_t count = 0;
  each_span(n, [&](int64_t i, auto span) {
    const F16 u = keep(load(upper + i, span), set1(-__builtin_inff()), span);
    uint32_t left = ~mask_bits(lt(u, set1(least))) & 0xffffu;
    for (; left; left &= left - 1) {
      const int64_t row = i + __builtin_ctz(left);
      if (row < n) rows[count++] = int32_t(row);  // least may be -inf or NaN
    }
  });
  return count;
}

template <class Dot>
constexpr ScreenKernels screen_kernels(const char* isa) {
  return {isa, pack, screen_high<Dot>, screen_low<Dot>, survivors};
}

}  // namespace
}  // namespace bitnet
