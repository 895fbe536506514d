// The screen of a vocabulary table: an int8 copy that says which logits can be among the largest,
// so that only those are computed from the table itself.
//
// Row w of the table is kept as codes c = rint(w_e / s) + 128 in 1..255, s = max |w_e| / 127, in
// two planes of nibbles, c = 16 u + l. The plane of the u alone says w_e ~ s (16 u - 120.5), a copy
// of 4 bits; with the l it says w_e ~ s (c - 128). A plane has V rows of `row_bytes`: for each 128
// elements 64 bytes, byte j holding element j in its low and element j + 64 in its high half.
// The row of hidden states x is kept as 16-bit integers X = rint(x / t), t = max |x_e| / 32512, in
// two signed bytes, X = 256 a + b.  So the sums over e of u X and l X are integers, exact in any
// order, and every float below is computed alike on every ISA.
//
// The bound.  With v_e the screen's value of w_e, all sums over e, and y the logit that the exact
// projection computes in float32,
//
//   y - (t sum v_e X_e + bias)
//     = sum (w_e - v_e) x_e             (1) the table's rounding
//     + sum v_e (x_e - t X_e)           (2) the hidden state's
//     + y - (sum w_e x_e + bias)        (3) the exact projection's
//     + float rounding of the estimate  (4)
//
// (1) Split the elements into a few outliers O, where |x_e| is large, and the rest.
//     |(1)| <= max |w_e - v_e| sum_O |x_e| + ||w - v||_2 ||x_rest||_2   (Hoelder, Cauchy-Schwarz),
//     where |w_e - v_e| <= 0.501 s with both planes and 8.001 s with one: the quotient w_e / s is
//     rounded by at most 127 / 2^24.  ||w - v||_2 / s is stored for each row, rounded up.
// (2) |(2)| <= 128 s sum |x_e - t X_e|.
// (3) Sixteen chains of n = ceil(width / 16) FMAs, a tree of 4 additions, and the bias: at most
//     (n + 8) 2^-24 (1 + 2^-10) sum |w_e x_e| + 2^-24 |bias|, and |w_e| <= 127.5 s.
// (4) At most 14 roundings of values of at most 160 s t sum (256 |a_e| + |b_e|) + |bias|: less than
//     2^-20 of the first and 2^-22 of the second, (3)'s share of the bias included.
//
// So |y - estimate| <= s (error rest + slack) + 2^-22 |bias| + floor, where error is stored for
// each row, and rest = ||x_rest||_2, slack and floor belong to x alone.  They are computed in
// double and raised by 2^-20 for the roundings of this line.  floor = 2^-100 (1 + sum |x_e|) stands
// for all underflow and for rows below 2^-100, whose s is 0.  Nothing overflows while 127.5 max s
// sum |x_e| and sum |x_e| are below 2^100; beyond, for sum |x_e| < 2^-60, and for tables or hidden
// states that are not finite, the screen is not asked.
//
// Why it selects exactly: k rows have y >= t, the k-th largest of the lower bounds; a row whose
// upper bound is below t is below k others, ties or not.
#pragma once
#include "base/types.h"

namespace bitnet {

struct ScreenTable {
  uint8_t *high, *low;                    // the planes [V][row_bytes]
  float *scale, *error_high, *error_low;  // [V] s, and ||w - v||_2 / s with one plane and both
  int64_t width, row_bytes;
};

constexpr int64_t screen_row_bytes(int64_t width) { return (width + 127) / 128 * 64; }
constexpr int64_t kScreenWidth = 1 << 20;  // 15 * 128 * 2^20 < 2^31: no sum of nibbles overflows

// A row of hidden states, and the terms of its bound.
struct ScreenQuery {
  const int8_t *coarse, *fine;   // [2 * row_bytes] a and b, zeros past the width
  int32_t coarse_sum, fine_sum;  // 8 sum a, 8 sum b
  float step;                    // t
  float middle;                  // 7.5 / 16 sum X
  float rest, slack_high, slack_low, floor;
};

// Bounds of a row of logits, [V] each.
struct ScreenBounds {
  float* high;  // sum (u - 8) X, which the low plane builds on
  float *lower, *upper;
};

struct ScreenKernels {
  const char* isa;
  // Rows [begin, end) of the copy; a row that is not finite gets the scale NaN.
  void (*pack)(const void* table, Dtype dtype, int64_t stride, const ScreenTable& t, int64_t begin,
               int64_t end);
  // Bounds of rows [begin, end) from the high plane; bias: [V] or null.
  void (*screen_high)(const ScreenTable& t, const ScreenQuery& q, const float* bias, int64_t begin,
                      int64_t end, const ScreenBounds& bounds);
  // Bounds of the rows listed, from the low plane and what screen_high left in bounds.high.
  void (*screen_low)(const ScreenTable& t, const ScreenQuery& q, const float* bias,
                     const int32_t* rows, int64_t count, const ScreenBounds& bounds);
  // Lists the i in [0, n) whose upper bound is not below `least`; returns how many.
  int64_t (*survivors)(const float* upper, int64_t n, float least, int32_t* rows);
};

extern const ScreenKernels screen_scalar;
extern const ScreenKernels screen_avx2;
extern const ScreenKernels screen_avxvnni;
extern const ScreenKernels screen_avxvnni_evex;
extern const ScreenKernels screen_avx512;
extern const ScreenKernels screen_avx512vnni;

}  // namespace bitnet
