// Matrix instructions of a warpgroup, four warps from a multiple of four on (sm_90a).
//
// A comes from registers, as four fragments of m16n8k32 (mma.cuh), warp w rows 16 w on; B from
// shared memory; D[64][128] is held as d[i]: row 16 w + g + 8 (i / 2 % 2), column
// 8 (i / 4) + 2 t + i % 2. The instructions run beside the code: between wgmma_fence and
// wgmma_wait nothing may touch their registers, nor write their shared memory.
#pragma once
#include "async.cuh"

// B in shared memory as columns of 128 bytes along k, 16-byte chunk c of column n at c ^ (n % 8),
// 1024-byte aligned: eight columns are 1024 bytes. `k`: the byte of the first k, a multiple of 32.
INLINE uint64_t wgmma_columns(const uint8_t* shared, int k) {
  constexpr uint64_t kSwizzle128 = 1, kGroupBytes = 1024, kUnused = 1;
  const uint64_t address = (shared_address(shared) + k) & 0x3ffff;
  return kSwizzle128 << 62 | (kGroupBytes >> 4) << 32 | kUnused << 16 | address >> 4;
}

// Give registers of this warpgroup away, or take given ones; kRegisters a thread, of 8.
template <int kRegisters>
INLINE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
INLINE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending of the committed groups, the newest, are under way.
template <int kPending>
INLINE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// D[64][128] += A[64][32] B[32][128], A unsigned bytes, B signed; exact, wrapping at 32 bits.
INLINE void wgmma_u8_s8(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t columns) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.eq.u32 add, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, add;\n"
      "}\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]),
        "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]),
        "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]),
        "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]),
        "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), "+r"(d[32]), "+r"(d[33]), "+r"(d[34]),
        "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), "+r"(d[40]), "+r"(d[41]),
        "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]), "+r"(d[48]),
        "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]),
        "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]),
        "+r"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns));
}
