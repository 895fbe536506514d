// What the processor and the operating system offer, by CPUID and XGETBV.
#pragma once
#include <cstdint>
#include <string>

namespace bitnet {

// In ascending order of preference; the names are those of BITNET_ISA and bx.set_isa.
enum class Isa : int { scalar = 0, avx2, avxvnni, avxvnni_evex, avx512, avx512vnni, amx_int8 };
inline constexpr int kIsaCount = 7;

const char* isa_name(Isa isa);
const char* isa_description(Isa isa);
bool isa_supported(Isa isa);  // compiled in, and this CPU and kernel can run it
std::string cpu_brand();

// Bytes ahead of its reads that a kernel which reads weights once, in one stream, should prefetch.
// 4096 takes a Cascade Lake from 80% of its read bandwidth to all of it; a Zen 4 streams 25 GB/s by
// itself and 18 with any such request (one thread, of 32), so AMD's have 0: the line at hand, which
// costs nothing.
int64_t stream_ahead();

}  // namespace bitnet
