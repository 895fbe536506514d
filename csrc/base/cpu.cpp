#include "base/cpu.h"

#include <cstring>

#include "base/os.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace bitnet {
namespace {

struct IsaRow {
  const char* name;
  const char* description;
};
constexpr IsaRow kIsas[kIsaCount] = {
    {"scalar", "portable C++, the definition of every kernel"},
    {"avx2", "AVX2, FMA, F16C"},
    {"avxvnni", "AVX2, FMA, F16C, AVX-VNNI (256 bit)"},
    {"avxvnni_evex", "the AVX-VNNI kernels in the encoding of AVX-512 VL and VNNI"},
    {"avx512", "AVX-512 F, BW, VL, DQ"},
    {"avx512vnni", "AVX-512 F, BW, VL, DQ, VNNI"},
    {"amx_int8", "AVX-512 F, BW, VL, DQ, VNNI and AMX tiles of int8"},
};

#if defined(__x86_64__)
struct Features {
  bool avx2 = false, avxvnni = false, avx512 = false, avx512vnni = false, amx_int8 = false;
};

uint64_t xgetbv0() {
  uint32_t eax, edx;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (uint64_t(edx) << 32) | eax;
}

Features detect() {
  Features f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !avx) return f;
  const uint64_t xcr0 = xgetbv0();
  const bool ymm = (xcr0 & 0x6) == 0x6;            // the kernel saves xmm and ymm
  const bool zmm = (xcr0 & 0xe6) == 0xe6;          // and opmask, zmm0-15 upper halves, zmm16-31
  const bool tiles = (xcr0 & 0x60000) == 0x60000;  // and the tiles, with their configuration
  uint32_t b7, c7, d7;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return f;
  const uint32_t leaves = a;
  f.avx2 = ymm && fma && f16c && (b7 >> 5 & 1);
  const bool f512 = b7 >> 16 & 1, dq = b7 >> 17 & 1, bw = b7 >> 30 & 1, vl = b7 >> 31 & 1;
  f.avx512 = f.avx2 && zmm && f512 && dq && bw && vl;
  f.avx512vnni = f.avx512 && (c7 >> 11 & 1);
  const bool amx_tile = d7 >> 24 & 1, amx_int8 = d7 >> 25 & 1;
  f.amx_int8 = f.avx512vnni && tiles && amx_tile && amx_int8 && os_allow_tiles();
  if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avxvnni = f.avx2 && (a >> 4 & 1);
  return f;
}
#endif

}  // namespace

const char* isa_name(Isa isa) { return kIsas[int(isa)].name; }
const char* isa_description(Isa isa) { return kIsas[int(isa)].description; }

bool isa_supported(Isa isa) {
  if (isa == Isa::scalar) return true;
#if defined(__x86_64__)
  static const Features f = detect();
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return f.avx2;
    case Isa::avxvnni:
      return f.avxvnni;
    case Isa::avxvnni_evex:
      return f.avx512vnni;
    case Isa::avx512:
      return f.avx512;
    case Isa::avx512vnni:
      return f.avx512vnni;
    case Isa::amx_int8:
      return f.amx_int8;
  }
#endif
  return false;
}

bool made_by_amd() {
#if defined(__x86_64__)
  uint32_t a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == 0x68747541 && d == 0x69746e65 && c == 0x444d4163;
#else
  return false;
#endif
}

std::string cpu_brand() {
#if defined(__x86_64__)
  uint32_t regs[12] = {};
  uint32_t a, b, c, d;
  if (__get_cpuid(0x80000000u, &a, &b, &c, &d) && a >= 0x80000004u) {
    for (uint32_t i = 0; i < 3; ++i)
      __get_cpuid(0x80000002u + i, &regs[4 * i], &regs[4 * i + 1], &regs[4 * i + 2],
                  &regs[4 * i + 3]);
    char text[49] = {};
    std::memcpy(text, regs, 48);
    std::string brand(text);
    while (!brand.empty() && brand.back() == ' ') brand.pop_back();
    return brand;
  }
#endif
  return "unknown";
}

}  // namespace bitnet
