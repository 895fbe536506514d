// The functions of bitnet_ext/gpu/mma.cuh, from the fragment maps of the PTX manual ("Matrix
// Fragments for mma.m16n8k32" and "mma.m16n8k16", "ldmatrix"), element by element.
#pragma once
#include "async.cuh"

namespace emulated {

template <class Sum>
struct MmaOperands {
  Sum (&d)[4];
  const uint32_t (&a)[4];
  const uint32_t (&b)[2];
};

// D[16][8] += A[16][kDepth] B[kDepth][8], kEach elements a register.
// a_of(word, i), b_of(word, i): element i of a register; sums are made in Wide.
template <class Wide, int kEach, class Sum, class AOf, class BOf>
void mma(const char* what, Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], AOf a_of,
         BOf b_of) {
  constexpr int kDepth = 8 * kEach;
  MmaOperands<Sum> mine{d, a, b};
  together(warp(), lane(), 0xffffffffu, what, mine, [&](MmaOperands<Sum>** lanes) {
    using Element = decltype(a_of(0u, 0));
    Element rows[16][kDepth], columns[8][kDepth];
    for (int l = 0; l < kWarp; ++l) {
      const int group = l >> 2, member = l & 3;
      for (int i = 0; i < 4 * kEach; ++i) {
        const int row = i / kEach % 2 ? group + 8 : group;
        const int k = member * kEach + i % kEach + (i >= 2 * kEach ? kDepth / 2 : 0);
        rows[row][k] = a_of(lanes[l]->a[i / kEach], i % kEach);
      }
      for (int i = 0; i < 2 * kEach; ++i) {
        const int k = member * kEach + i % kEach + (i >= kEach ? kDepth / 2 : 0);
        columns[group][k] = b_of(lanes[l]->b[i / kEach], i % kEach);
      }
    }
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? l >> 2 : (l >> 2) + 8, column = (l & 3) * 2 + (i & 1);
        Wide sum = Wide(lanes[l]->d[i]);
        for (int k = 0; k < kDepth; ++k) sum += Wide(rows[row][k]) * Wide(columns[column][k]);
        lanes[l]->d[i] = Sum(sum);
      }
  });
}

inline int signed_byte(uint32_t word, int i) { return int8_t(word >> 8 * i); }
inline int unsigned_byte(uint32_t word, int i) { return uint8_t(word >> 8 * i); }

template <class T>
float half_of(uint32_t word, int i) {
  return to_float(T{uint16_t(word >> 16 * i)});
}

inline void load_matrices(const char* what, uint32_t (&w)[4], const void* row, bool transposed) {
  struct Operands {
    uint32_t (&w)[4];
    const void* row;
  } mine{w, row};
  if (shared_address(row) % 16) fail("%s: row off its boundary of 16 bytes", what);
  together(warp(), lane(), 0xffffffffu, what, mine, [&](Operands** lanes) {
    uint16_t matrix[4][8][8];
    for (int l = 0; l < kWarp; ++l) memcpy(matrix[l / 8][l % 8], lanes[l]->row, 16);
    for (int l = 0; l < kWarp; ++l)
      for (int m = 0; m < 4; ++m) {
        const int r = l / 4, c = l % 4 * 2;
        const uint16_t low = transposed ? matrix[m][c][r] : matrix[m][r][c];
        const uint16_t high = transposed ? matrix[m][c + 1][r] : matrix[m][r][c + 1];
        lanes[l]->w[m] = uint32_t(high) << 16 | low;
      }
  });
}

}  // namespace emulated

inline void mma_u8_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<int64_t, 4>("mma_u8_s8", d, a, b, emulated::unsigned_byte, emulated::signed_byte);
}

inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<int64_t, 4>("mma_s8", d, a, b, emulated::signed_byte, emulated::signed_byte);
}

// Sums are made in double and rounded once: the hardware's last bits are its own.
template <class T>
void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<double, 2>("mma_half", d, a, b, emulated::half_of<T>, emulated::half_of<T>);
}

inline void load_matrices(uint32_t (&w)[4], const void* row) {
  emulated::load_matrices("load_matrices", w, row, false);
}

inline void load_matrices_transposed(uint32_t (&w)[4], const void* row) {
  emulated::load_matrices("load_matrices_transposed", w, row, true);
}
