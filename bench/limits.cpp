// What this machine can do at most, measured beside the kernels: dot products in registers only,
// and reading memory in one stream.  Compiled by limits.py on the machine that runs the bench.
#include <immintrin.h>
#include <stdint.h>

#define REPEAT_12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define REPEAT_24(X) \
  REPEAT_12(X) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)

extern "C" {

// Multiply-adds done by 24 independent sums of 16 x 4.
__attribute__((target("avx512f,avx512vnni"))) int64_t vpdpbusd_zmm(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
#define X(n) __asm__ volatile("vpdpbusd %%zmm31, %%zmm30, %%zmm" #n::: "xmm" #n);
    REPEAT_24(X)
#undef X
  }
  return rounds * 24 * 64;
}

__attribute__((target("avx512f,avx512vl,avx512vnni"))) int64_t vpdpbusd_ymm(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
#define X(n) __asm__ volatile("vpdpbusd %%ymm31, %%ymm30, %%ymm" #n::: "xmm" #n);
    REPEAT_24(X)
#undef X
  }
  return rounds * 24 * 32;
}

// Full tiles onto four sums of their own.  The process needs leave to use tiles, which choosing the
// ISA amx_int8 has asked for.
int64_t tdpbsud_tiles(int64_t rounds) {
  alignas(64) static const uint8_t config[64] = {
      1,  0,  0,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0,   // palette
      64, 0,  64, 0,  64, 0,  64, 0,  64, 0, 64, 0, 64, 0, 64, 0,   // bytes of a row
      0,  0,  0,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0,   //
      16, 16, 16, 16, 16, 16, 16, 16, 0,  0, 0,  0, 0,  0, 0,  0};  // rows
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
  for (int64_t i = 0; i < rounds; ++i)
    __asm__ volatile(
        "tdpbsud %tmm6, %tmm4, %tmm0\n\t"
        "tdpbsud %tmm7, %tmm4, %tmm1\n\t"
        "tdpbsud %tmm6, %tmm5, %tmm2\n\t"
        "tdpbsud %tmm7, %tmm5, %tmm3");
  __asm__ volatile("tilerelease");
  return rounds * 4 * 16 * 16 * 64;
}

// vpmaddubsw into int16 and vpaddw onto a sum, 12 independent sums.
__attribute__((target("avx2"))) int64_t maddubs_ymm(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
#define X(n)                                     \
  __asm__ volatile(                              \
      "vpmaddubsw %%ymm15, %%ymm14, %%ymm13\n\t" \
      "vpaddw %%ymm13, %%ymm" #n ", %%ymm" #n::  \
          : "xmm" #n, "xmm13");
    REPEAT_12(X)
#undef X
  }
  return rounds * 12 * 32;
}

__attribute__((target("avx512f,avx512bw"))) int64_t maddubs_zmm(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
#define X(n)                                     \
  __asm__ volatile(                              \
      "vpmaddubsw %%zmm31, %%zmm30, %%zmm29\n\t" \
      "vpaddw %%zmm29, %%zmm" #n ", %%zmm" #n::  \
          : "xmm" #n, "xmm29");
    REPEAT_12(X)
#undef X
  }
  return rounds * 12 * 64;
}

// Float multiply-adds of 12 (ymm) or 24 (zmm) independent sums.
__attribute__((target("avx2,fma"))) int64_t fma_ymm(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
#define X(n) __asm__ volatile("vfmadd231ps %%ymm15, %%ymm14, %%ymm" #n::: "xmm" #n);
    REPEAT_12(X)
#undef X
  }
  return rounds * 12 * 8;
}

__attribute__((target("avx512f"))) int64_t fma_zmm(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
#define X(n) __asm__ volatile("vfmadd231ps %%zmm31, %%zmm30, %%zmm" #n::: "xmm" #n);
    REPEAT_24(X)
#undef X
  }
  return rounds * 24 * 16;
}

// Reads `bytes` (a multiple of 256) and returns them.
__attribute__((target("avx2"))) int64_t read_stream(const uint8_t* p, int64_t bytes) {
  __m256i sums[8] = {};
  for (int64_t i = 0; i < bytes; i += 256) {
    _mm_prefetch(reinterpret_cast<const char*>(p + i + 4096), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(p + i + 4160), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(p + i + 4224), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(p + i + 4288), _MM_HINT_T0);
    for (int j = 0; j < 8; ++j)
      sums[j] = _mm256_add_epi64(
          sums[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + 32 * j)));
  }
  for (int j = 1; j < 8; ++j) sums[0] = _mm256_add_epi64(sums[0], sums[j]);
  volatile int64_t sink = _mm256_extract_epi64(sums[0], 0);
  (void)sink;
  return bytes;
}

}  // extern "C"
