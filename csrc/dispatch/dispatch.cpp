#include "dispatch/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace bitnet {
namespace {

#if defined(__x86_64__)
// A Zen 4 adds 16-bit integers on pipes that have no part in vpdpbusd; on an Intel core the two
// share their ports, and there lookups beside dot products have not been measured.
const TernaryKernels* avx512vnni_products() {
  return made_by_amd() ? &ternary_avx512vnni_mixed : &ternary_avx512vnni;
}

const Kernels kTables[kIsaCount] = {
    {Isa::scalar, &ternary_scalar, &rowwise_scalar, &vocab_scalar, &attention_scalar, &mask_scalar,
     &screen_scalar, &attention_int8_scalar},
    {Isa::avx2, &ternary_avx2, &rowwise_avx2, &vocab_avx2, &attention_avx2, &mask_avx2,
     &screen_avx2, &attention_int8_avx2},
    {Isa::avxvnni, &ternary_avxvnni, &rowwise_avx2, &vocab_avx2, &attention_avx2, &mask_avx2,
     &screen_avxvnni, &attention_int8_avxvnni},
    {Isa::avxvnni_evex, &ternary_avxvnni_evex, &rowwise_avx2, &vocab_avx2, &attention_avx2,
     &mask_avx2, &screen_avxvnni_evex, &attention_int8_avxvnni_evex},
    {Isa::avx512, &ternary_avx512, &rowwise_avx512, &vocab_avx512, &attention_avx512, &mask_avx512,
     &screen_avx512, &attention_int8_avx512},
    {Isa::avx512vnni, avx512vnni_products(), &rowwise_avx512, &vocab_avx512, &attention_avx512,
     &mask_avx512, &screen_avx512vnni, &attention_int8_avx512vnni},
    {Isa::amx_int8, &ternary_amx_int8, &rowwise_avx512, &vocab_avx512, &attention_avx512,
     &mask_avx512, &screen_avx512vnni, &attention_int8_avx512vnni},
};
#else
const Kernels kTables[] = {
    {Isa::scalar, &ternary_scalar, &rowwise_scalar, &vocab_scalar, &attention_scalar, &mask_scalar,
     &screen_scalar, &attention_int8_scalar},
};
#endif

std::atomic<const Kernels*> current{nullptr};

std::string names_of(const std::vector<Isa>& isas) {
  std::string text;
  for (const Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

const Kernels* table_named(const std::string& name) {
  if (name == "auto") return &kTables[int(available_isas().back())];
  for (int i = 0; i < kIsaCount; ++i) {
    if (name != isa_name(Isa(i))) continue;
    if (isa_supported(Isa(i))) return &kTables[i];
    throw std::runtime_error("ISA '" + name + "' is not available on this CPU (" + cpu_brand() +
                             "); available: " + names_of(available_isas()));
  }
  throw std::runtime_error("unknown ISA '" + name + "'; available: auto, " +
                           names_of(available_isas()));
}

}  // namespace

std::vector<Isa> available_isas() {
  std::vector<Isa> found;
  for (int i = 0; i < kIsaCount; ++i)
    if (isa_supported(Isa(i))) found.push_back(Isa(i));
  return found;
}

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_acquire);
  if (!table) {
    const char* forced = std::getenv("BITNET_ISA");
    table = table_named(forced && *forced ? forced : "auto");
    current.store(table, std::memory_order_release);
  }
  return *table;
}

void set_isa(const std::string& name) { current.store(table_named(name)); }

}  // namespace bitnet
