// What the processor and the operating system offer, by CPUID and XGETBV.
#pragma once
#include <string>

namespace bitnet {

// In ascending order of preference; the names are those of BITNET_ISA and bx.set_isa.
enum class Isa : int { scalar = 0, avx2, avxvnni, avxvnni_evex, avx512, avx512vnni, amx_int8 };
inline constexpr int kIsaCount = 7;

const char* isa_name(Isa isa);
const char* isa_description(Isa isa);
bool isa_supported(Isa isa);  // compiled in, and this CPU and kernel can run it
std::string cpu_brand();
bool made_by_amd();

}  // namespace bitnet
