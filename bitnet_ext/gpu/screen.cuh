// The screen of a vocabulary table on a device: an int8 copy that says which logits can be among
// the largest, so that only those are computed from the table itself. csrc/screen/screen.h has the
// idea and the proof; here the copy has two planes of 4 bits.
//
// Row w of the table is kept as codes c = rint(w_e / s) + 128 in 1..255, s = max |w_e| / 127, and
// c = 16 u + l: the plane of the u alone says w_e ~ s (16 (u - 8) + 7.5), both say w_e ~ s (c -
// 128). Elements past the width have the code 128.
//
//   high[tile][span][lane][4]    uint32, for m16n8k32 (mma.cuh): tile 16 rows, span 64 elements,
//     lane 4 g + t; word i, bits 8 b + 4 j (b = 0..3, j = 0, 1):
//     u of row 16 tile + g + 8 (i & 1), element 64 span + 16 t + 8 j + 4 (i >> 1) + b
//   low[row][step][4]            uint32, step 32 elements; word i, bits 8 b + 4 j:
//     l of element 32 step + 8 i + 4 j + b
//
// A row of hidden states x is kept as integers X = rint(x / t) of 16 bits, t = max |x_e| / 32512,
// in two signed bytes, X = 256 a + b: pieces[2 m] are the a of row m, pieces[2 m + 1] the b. Nibble
// j of the high words is the A fragment of step j, and a lane's 16 bytes of a piece from 64 span +
// 16 t on are its B fragments: which k an instruction sums is free, as long as A and B agree. Sums
// of codes and pieces are integers, exact in any order: at most 15 * 128 * 2^18 < 2^29.
//
// The bound. With v_e the copy's value of w_e and y the logit that the exact projection computes,
//
//   y - (t sum v_e X_e + bias)
//     = sum (w_e - v_e) x_e             (1) the table's rounding
//     + sum v_e (x_e - t X_e)           (2) the hidden state's
//     + y - (sum w_e x_e + bias)        (3) the exact projection's
//     + float rounding of the estimate  (4)
//
// (1) <= max |w_e - v_e| sum_O |x_e| + ||w - v||_2 ||x_rest||_2 for any set O of outliers, where
//     |w_e - v_e| <= 8.001 s with one plane, 0.501 s with both, and ||w - v||_2 / s is stored for
//     each row, rounded up.
// (2) <= 128 s sum |x_e - t X_e|.
// (3) <= (n + 8) 2^-24 (1 + 2^-10) sum |w_e x_e| + 2^-24 |bias|, n = ceil(width / 16): sixteen
//     chains of FMAs, a tree and the bias; |w_e| <= 127.5 s.
// (4) At most 12 roundings of values of at most 160 s t sum (256 |a_e| + |b_e|) + |bias|: less than
//     2^-19 of the first and 2^-22 of the second, (3)'s share of the bias included.
//
// So |y - estimate| <= s (error rest + slack) + 2^-22 |bias| + floor, where error is stored for
// each row, and rest = ||x_rest||_2, slack and floor belong to x alone: computed in double and
// raised by 2^-20 for the roundings of this line. floor = 2^-100 (1 + sum |x_e|) stands for all
// underflow and for rows below 2^-100, whose s is 0. Nothing overflows while 127.5 max s sum |x_e|
// and sum |x_e| are below 2^100; beyond, for sum |x_e| < 2^-60, and for tables or hidden states
// that are not finite, no bound is known.
//
// Why it selects exactly: the rows of the table stand in groups of kGroupRows. k groups have a
// lower bound not below t, the k-th largest of the groups' largest lower bounds, so k rows have
// y >= t; a row whose upper bound is below t is below k others, ties or not.
#pragma once
#include "ptx.cuh"

constexpr int kSpan = 64, kStep = 32;  // elements
constexpr int kTileRows = 16;          // of the table, a matrix instruction's
constexpr int kGroupRows = 64;         // with one largest lower bound

// What belongs to a row of hidden states.
struct alignas(64) ScreenRow {
  float step, centre;              // t, and sum X 7.5 / 16: the middle of what is unknown
  float rest, slack[2], floor;     // slack of one plane, of both
  int32_t coarse_less, fine_less;  // 8 sum a, 8 sum b: u stands for 16 (u - 8)
  uint32_t listed[2];              // rows of the table that one plane leaves, that both leave
  int32_t screened;                // 0: not active, or no bound is known
};

// The table's side, [vocab] each: s, and error of one plane and of both.
struct ScreenTerms {
  const float *scale, *error[2];
};

INLINE ScreenTerms terms_of(const float* terms, int vocab) {
  return {terms, {terms + vocab, terms + 2 * int64_t(vocab)}};
}

struct Bounds {
  float lower, upper;
};

// From the sum of the u - 8 (plane 0), or of 16 (u - 8) + l (plane 1), times X.
template <int kPlane>
INLINE Bounds bounds_of(const ScreenTerms& terms, const float* bias, const ScreenRow& row, int v,
                        float sum) {
  const float scale = terms.scale[v], b = bias ? bias[v] : 0.0f;
  const float step = kPlane == 0 ? mul_rn(16.0f, row.step) : row.step;
  const float centred = kPlane == 0 ? add_rn(sum, row.centre) : sum;
  const float estimate = add_rn(mul_rn(mul_rn(scale, step), centred), b);
  const float rounding = fma_rn(terms.error[kPlane][v], row.rest, row.slack[kPlane]);
  const float reach = fma_rn(scale, rounding, fma_rn(magnitude(b), 0x1p-22f, row.floor));
  return {sub_rn(estimate, reach), add_rn(estimate, reach)};
}

// 256 coarse + fine.
INLINE float whole_sum(int32_t coarse, int32_t fine) {
  return fma_rn(to_float(coarse), 256.0f, to_float(fine));
}
