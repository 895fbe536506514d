// The screen of a vocabulary table: an int8 copy that says which logits can be among the largest,
// so that only those are computed from the table itself.
//
// Row w of the table is kept as codes c = rint(w_e / s) + 128 in 1..255, s = max |w_e| / 127, in
// three planes, c = 16 u + 4 m + l, u of 4 bits, m and l of 2.  The plane of the u alone says
// w_e ~ s (16 u - 120.5), a copy of 4 bits; with the m it says w_e ~ s (16 u + 4 m - 126.5), one of
// 6; with the l, w_e ~ s (c - 128).  Rows are padded to 256 elements.  A line of 64 bytes holds
// 128 elements of u, or 256 of m or l: byte j has elements j, j + 64, ... from its low bits up.
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
//     where |w_e - v_e| <= 8.001 s, 2.001 s and 0.501 s with one, two and three planes: the
//     quotient w_e / s is rounded by at most 127 / 2^24.  ||w - v||_2 / s is stored for each row,
//     rounded up.
// (2) |(2)| <= 128 s sum |x_e - t X_e|.
// (3) Sixteen chains of n = ceil(width / 16) FMAs, a tree of 4 additions, and the bias: at most
//     (n + 8) 2^-24 (1 + 2^-10) sum |w_e x_e| + 2^-24 |bias|, and |w_e| <= 127.5 s.
// (4) At most 18 roundings of values of at most 160 s t sum (256 |a_e| + |b_e|) + |bias|: less than
//     2^-19 of the first and 2^-22 of the second, (3)'s share of the bias included.
//
// So |y - estimate| <= s (error rest + slack) + 2^-22 |bias| + floor, where error is stored for
// each row, and rest = ||x_rest||_2, slack and floor belong to x alone.  They are computed in
// double and raised by 2^-20 for the roundings of this line.  floor = 2^-100 (1 + sum |x_e|) stands
// for all underflow and for rows below 2^-100, whose s is 0.  Nothing overflows while 127.5 max s
// sum |x_e| and sum |x_e| are below 2^100; beyond, for sum |x_e| < 2^-60, and for tables or hidden
// states that are not finite, the screen is not asked.
//
// Why it selects exactly: t is the least of k logits, those of the k largest lower bounds; a row
// whose upper bound is below t is below k others, ties or not.
#pragma once
#include "base/types.h"

namespace bitnet {

constexpr int kPlanes = 3;
constexpr int kPlaneBits[kPlanes] = {4, 2, 2};
constexpr float kPlaneUnit[kPlanes] = {16, 4, 1};  // what a plane's code stands for, in s

struct ScreenTable {
  uint8_t* plane[kPlanes];  // [V][screen_row_bytes]
  float* error[kPlanes];    // [V] ||w - v||_2 / s with this plane and those before it
  float* scale;             // [V] s
  int64_t width;
};

constexpr int64_t screen_width(int64_t width) { return (width + 255) / 256 * 256; }
constexpr int64_t screen_row_bytes(int64_t width, int plane) {
  return screen_width(width) / 8 * kPlaneBits[plane];
}
constexpr int64_t kScreenWidth = 1 << 18;  // 63 * 128 * 2^18 < 2^31: no sum of codes overflows

// A row of hidden states, and the terms of its bound.
struct ScreenQuery {
  const int8_t *coarse, *fine;   // [screen_width] a and b, zeros past the width
  int32_t coarse_sum, fine_sum;  // 8 sum a, 8 sum b
  float step;                    // t
  float centre[kPlanes];         // sum X times 7.5 / 16, 1.5 / 4, 0: the middle of what is unknown
  float rest, slack[kPlanes], floor;
};

// Bounds of a row of logits, [V] each.
struct ScreenBounds {
  float* sum;  // in units of the last plane seen: sum (u - 8) X, 4 times that + sum m X, ...
  float *lower, *upper;
};

struct ScreenKernels {
  const char* isa;
  // Rows [begin, end) of the copy; a row that is not finite gets the scale NaN.
  void (*pack)(const void* table, Dtype dtype, int64_t stride, const ScreenTable& t, int64_t begin,
               int64_t end);
  // Bounds of rows [begin, end) from the first plane or the first two at once; bias: [V] or null.
  void (*screen_all)(const ScreenTable& t, const ScreenQuery& q, const float* bias, int planes,
                     int64_t begin, int64_t end, const ScreenBounds& bounds);
  // Bounds of the rows listed, from plane 1 or 2 and what the plane before left in bounds.sum.
  void (*screen_listed)(const ScreenTable& t, const ScreenQuery& q, const float* bias, int plane,
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
