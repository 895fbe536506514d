// The floating-point environment of every kernel: round to nearest, no flush to zero.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace bitnet {

// Sets the environment on entry and restores the caller's on exit (torch turns FTZ on, for one).
class FpEnv {
 public:
#if defined(__x86_64__)
  FpEnv() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // all exceptions masked, nearest
  ~FpEnv() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  FpEnv() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    const uint64_t plain = 0;
    __asm__ volatile("msr fpcr, %0" ::"r"(plain));
  }
  ~FpEnv() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }
#endif
  FpEnv(const FpEnv&) = delete;
  FpEnv& operator=(const FpEnv&) = delete;

 private:
#if defined(__aarch64__)
  uint64_t saved_ = 0;
#else
  unsigned saved_ = 0;
#endif
};

}  // namespace bitnet
