// Matrix instructions of a warp (sm_80 on): D = A B + D, and the loads that fill their fragments.
//
// With lane = 4 g + t (g = 0..7, t = 0..3), a register holds 4 bytes, or 2 halves, along k:
//
//   int8  m16n8k32   A[0]: row g,     k 4t..4t+3     A[2]: row g,     k 16+4t..
//                    A[1]: row g + 8, k 4t..         A[3]: row g + 8, k 16+4t..
//                    B[0]: column g,  k 4t..         B[1]: column g,  k 16+4t..
//   half  m16n8k16   the same with k 2t, 2t+1 and 8+2t, 9+2t
//   D     both       D[0], D[1]: row g, columns 2t, 2t + 1;  D[2], D[3]: row g + 8
#pragma once
#include "async.cuh"

// A: unsigned bytes, B: signed bytes; exact, wrapping at 32 bits.
INLINE void mma_u8_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A, B: signed bytes.
INLINE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A, B: half_t or bfloat_t; sums in float32, in the hardware's own order and rounding.
template <class T>
INLINE void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
INLINE void mma_half<half_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
INLINE void mma_half<bfloat_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 rows x 16 bytes from shared memory: lane 8 i + r gives the address of row r of
// matrix i, and lane 4 g + t gets bytes 4t..4t+3 of row g of matrix i in w[i].
INLINE void load_matrices(uint32_t (&w)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of halves, transposed: lane 4 g + t gets elements (2t, g) and (2t + 1, g).
INLINE void load_matrices_transposed(uint32_t (&w)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(shared_address(row))
               : "memory");
}
