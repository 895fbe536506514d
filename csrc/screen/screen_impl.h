// The screen's kernels over sixteen float lanes and an ISA's integer dot product; included once by
// each ISA's file, after its lanes header.  `Dot` has
//   Bytes      a vector of `bytes` unsigned bytes
//   Sums       a vector of int32 partial sums
//   lines      lines of 64 bytes that are loaded before any is used
//   load, zero, total
//   part<Bits, I>(bytes)    bits Bits * I and up of each byte
//   six<I>(bytes, bytes)    4 u + m: nibble I % 2 of the first, pair I of the second
//   add(sums, codes, x)     sums += codes . x, `bytes` signed bytes
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

  F16 squares[kPlanes] = {zero(), zero(), zero()};
  // Codes of 16 elements; those past the width stand for 0 and count no error.
  const auto codes = [&](int64_t i) {
    I16 c = set1_int(128);
    const auto take = [&](auto span) {
      const F16 quotient = div(row.at(i, span), divisor);
      const I16 q = to_int(quotient);
      c = add(q, set1_int(128));
      const auto miss = [&](F16 value, F16& sum) {
        const F16 off = keep(sub(quotient, value), zero(), span);
        sum = fma(off, off, sum);
      };
      miss(fma(to_float(shift_right<4>(c)), set1(16.0f), set1(-120.5f)), squares[0]);
      miss(fma(to_float(shift_right<2>(c)), set1(4.0f), set1(-126.5f)), squares[1]);
      miss(to_float(q), squares[2]);
    };
    if (i + 16 <= t.width)
      take(Whole{});
    else if (i < t.width)
      take(Part{int(t.width - i)});
    return c;
  };
  uint8_t* plane[kPlanes];
  for (int p = 0; p < kPlanes; ++p) plane[p] = t.plane[p] + v * screen_row_bytes(t.width, p);
  for (int64_t at = 0; at < screen_width(t.width); at += 256)
    for (int64_t j = 0; j < 64; j += 16) {
      const I16 c[4] = {codes(at + j), codes(at + 64 + j), codes(at + 128 + j),
                        codes(at + 192 + j)};
      const I16 two = set1_int(3), upper = set1_int(0xf0);
      for (int64_t half = 0; half < 2; ++half)
        store_bytes(plane[0] + at / 2 + 64 * half + j,
                    bit_or(shift_right<4>(c[2 * half]), bit_and(c[2 * half + 1], upper)));
      I16 middle = set1_int(0), low = middle;
      for (int part = 3; part >= 0; --part) {
        middle = bit_or(shift_left<2>(middle), bit_and(shift_right<2>(c[part]), two));
        low = bit_or(shift_left<2>(low), bit_and(c[part], two));
      }
      store_bytes(plane[1] + at / 4 + j, middle);
      store_bytes(plane[2] + at / 4 + j, low);
    }
  // Each difference is off by less than 2^-16, their sum by (width / 16 + 5) 2^-24 of itself.
  const float growth = 1.0f + float(t.width / 16 + 16) * 0x1p-23f;
  const float off = __builtin_sqrtf(float(t.width)) * 0x1p-16f;
  t.scale[v] = scale;
  for (int p = 0; p < kPlanes; ++p)
    t.error[p][v] = __builtin_sqrtf(reduce_add(squares[p])) * growth + off;
}

void pack(const void* table, Dtype dtype, int64_t stride, const ScreenTable& t, int64_t begin,
          int64_t end) {
  with_rows(table, dtype, stride, [&](auto row_at) {
    for (int64_t v = begin; v < end; ++v) pack_row(row_at(v), t, v);
  });
}

// --- bounds -----------------------------------------------------------------------------------
// Partial sums of one row of a plane, with a and with b; two chains each.
template <class Dot>
struct PlaneSums {
  decltype(Dot::zero()) a[2] = {Dot::zero(), Dot::zero()}, b[2] = {a[0], a[0]};
};

// Adds parts I, I + 1, ... of bytes that hold 8 / Bits codes each; part I stands at x + 64 I.
template <class Dot, int Bits, int I, class Bytes>
BITNET_INLINE void add_parts(Bytes bytes, const ScreenQuery& q, int64_t x, PlaneSums<Dot>& sums) {
  const auto codes = Dot::template part<Bits, I>(bytes);
  sums.a[I & 1] = Dot::add(sums.a[I & 1], codes, q.coarse + x + 64 * I);
  sums.b[I & 1] = Dot::add(sums.b[I & 1], codes, q.fine + x + 64 * I);
  if constexpr (Bits * (I + 1) < 8) add_parts<Dot, Bits, I + 1>(bytes, q, x, sums);
}

// Adds `Lines` lines of 64 bytes: loaded together before any is used, two of them (a Zen 4
// takes 6.5 ms for 164 MB, with one 7.2 and with five 7.7), one row at a time and without
// prefetches, which halve the rate there.
template <class Dot, int Bits, int Lines>
BITNET_INLINE void add_lines(const uint8_t* row, const ScreenQuery& q, int64_t at,
                             PlaneSums<Dot>& sums) {
  constexpr int vectors = Lines * 64 / Dot::bytes;
  decltype(Dot::load(row)) bytes[vectors];
#pragma GCC unroll 32
  for (int i = 0; i < vectors; ++i) bytes[i] = Dot::load(row + at + i * Dot::bytes);
#pragma GCC unroll 32
  for (int i = 0; i < vectors; ++i) {
    const int64_t byte = at + i * Dot::bytes, x = byte / 64 * (64 * 8 / Bits) + byte % 64;
    add_parts<Dot, Bits, 0>(bytes[i], q, x, sums);
  }
}

// sum codes X of one row of a plane = 256 coarse + fine.
template <class Dot, int Bits>
BITNET_INLINE void plane_sums(const uint8_t* row, int64_t row_bytes, const ScreenQuery& q,
                              int32_t& coarse, int32_t& fine) {
  PlaneSums<Dot> sums;
  int64_t at = 0;
  for (; at + 64 * Dot::lines <= row_bytes; at += 64 * Dot::lines)
    add_lines<Dot, Bits, Dot::lines>(row, q, at, sums);
  for (; at < row_bytes; at += 64) add_lines<Dot, Bits, 1>(row, q, at, sums);
  coarse = Dot::total(sums.a[0]) + Dot::total(sums.a[1]);
  fine = Dot::total(sums.b[0]) + Dot::total(sums.b[1]);
}

// Adds parts I, I + 1, ... of 4 u + m; those of u are in `first`, from the third on in `second`.
template <class Dot, int I, class Bytes>
BITNET_INLINE void add_sixes(Bytes first, Bytes second, Bytes pairs, const ScreenQuery& q,
                             int64_t x, PlaneSums<Dot>& sums) {
  const auto codes = Dot::template six<I>(I < 2 ? first : second, pairs);
  sums.a[I & 1] = Dot::add(sums.a[I & 1], codes, q.coarse + x + 64 * I);
  sums.b[I & 1] = Dot::add(sums.b[I & 1], codes, q.fine + x + 64 * I);
  if constexpr (I < 3) add_sixes<Dot, I + 1>(first, second, pairs, q, x, sums);
}

// Both planes of 256 elements at a time.
template <class Dot>
BITNET_INLINE void six_sums(const uint8_t* high, const uint8_t* middle, int64_t row_bytes,
                            const ScreenQuery& q, int32_t& coarse, int32_t& fine) {
  constexpr int vectors = 64 / Dot::bytes;
  PlaneSums<Dot> sums;
  for (int64_t at = 0; at < row_bytes; at += 64) {
    decltype(Dot::load(high)) first[vectors], second[vectors], pairs[vectors];
#pragma GCC unroll 64
    for (int i = 0; i < vectors; ++i) {
      const int64_t byte = i * Dot::bytes;
      first[i] = Dot::load(high + 2 * at + byte);
      second[i] = Dot::load(high + 2 * at + 64 + byte);
      pairs[i] = Dot::load(middle + at + byte);
    }
#pragma GCC unroll 64
    for (int i = 0; i < vectors; ++i)
      add_sixes<Dot, 0>(first[i], second[i], pairs[i], q, 4 * at + i * Dot::bytes, sums);
  }
  coarse = Dot::total(sums.a[0]) + Dot::total(sums.a[1]);
  fine = Dot::total(sums.b[0]) + Dot::total(sums.b[1]);
}

// Up to 16 rows of the table at a time: their terms of the bound side by side.
struct Group {
  int32_t coarse[16], fine[16];
  float scale[16], error[16], bias[16], sum[16], lower[16], upper[16];
};

BITNET_INLINE F16 whole_sum(const Group& g, int32_t coarse_less, int32_t fine_less) {
  const I16 coarse = sub(load_int(g.coarse), set1_int(coarse_less));
  const I16 fine = sub(load_int(g.fine), set1_int(fine_less));
  return fma(to_float(coarse), set1(256.0f), to_float(fine));
}

BITNET_INLINE void bound(Group& g, const ScreenQuery& q, int plane) {
  const F16 sum = add(load(g.sum), set1(q.centre[plane])), step = set1(kPlaneUnit[plane] * q.step);
  const F16 scale = load(g.scale), bias = load(g.bias);
  const F16 estimate = add(mul(mul(scale, step), sum), bias);
  const F16 rounding = fma(load(g.error), set1(q.rest), set1(q.slack[plane]));
  const F16 reach = fma(scale, rounding, fma(abs(bias), set1(0x1p-22f), set1(q.floor)));
  store(g.lower, sub(estimate, reach));
  store(g.upper, add(estimate, reach));
}

// Listed rows are too far from each other for the machine's own prefetchers (a Zen 4 takes 1.5 ms
// for 20,000 of 640 bytes, with none 2.2).
constexpr int64_t kRowsAhead = 3;
BITNET_INLINE void fetch(const uint8_t* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += BITNET_LINE) __builtin_prefetch(row + i);
}

// Rows row_at(0..count-1), 16 at a time: plane P after the one before it, or 0 and P at once.
template <class Dot, int P, bool AtOnce, class RowAt>
BITNET_INLINE void screen(const ScreenTable& t, const ScreenQuery& q, const float* bias,
                          int64_t count, const ScreenBounds& bounds, RowAt row_at) {
  static_assert(!AtOnce || P < 2, "two planes at most");
  const int64_t row_bytes = screen_row_bytes(t.width, P);
  Group g = {};
  for (int64_t begin = 0; begin < count; begin += 16) {
    const int64_t n = count - begin < 16 ? count - begin : 16;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t v = row_at(begin + j);
      const uint8_t* row = t.plane[P] + v * row_bytes;
      if (!AtOnce && begin + j + kRowsAhead < count)
        fetch(t.plane[P] + row_at(begin + j + kRowsAhead) * row_bytes, row_bytes);
      if constexpr (AtOnce && P > 0)
        six_sums<Dot>(t.plane[0] + 2 * v * row_bytes, row, row_bytes, q, g.coarse[j], g.fine[j]);
      else
        plane_sums<Dot, kPlaneBits[P]>(row, row_bytes, q, g.coarse[j], g.fine[j]);
      g.scale[j] = t.scale[v];
      g.error[j] = t.error[P][v];
      g.bias[j] = bias ? bias[v] : 0.0f;
      if (!AtOnce) g.sum[j] = bounds.sum[v];
    }
    constexpr int32_t units = P == 0 ? 1 : 4;  // of plane 0's code
    store(g.sum, AtOnce ? whole_sum(g, units * q.coarse_sum, units * q.fine_sum)
                        : fma(load(g.sum), set1(4.0f), whole_sum(g, 0, 0)));
    bound(g, q, P);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t v = row_at(begin + j);
      bounds.sum[v] = g.sum[j];
      bounds.lower[v] = g.lower[j];
      bounds.upper[v] = g.upper[j];
    }
  }
}

template <class Dot>
void screen_all(const ScreenTable& t, const ScreenQuery& q, const float* bias, int planes,
                int64_t begin, int64_t end, const ScreenBounds& bounds) {
  const auto row_at = [=](int64_t i) { return begin + i; };
  if (planes == 1)
    screen<Dot, 0, true>(t, q, bias, end - begin, bounds, row_at);
  else
    screen<Dot, 1, true>(t, q, bias, end - begin, bounds, row_at);
}

template <class Dot>
void screen_listed(const ScreenTable& t, const ScreenQuery& q, const float* bias, int plane,
                   const int32_t* rows, int64_t count, const ScreenBounds& bounds) {
  const auto row_at = [=](int64_t i) { return int64_t(rows[i]); };
  if (plane == 1)
    screen<Dot, 1, false>(t, q, bias, count, bounds, row_at);
  else
    screen<Dot, 2, false>(t, q, bias, count, bounds, row_at);
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
  return {isa, pack, screen_all<Dot>, screen_listed<Dot>, survivors};
}

}  // namespace
}  // namespace bitnet
