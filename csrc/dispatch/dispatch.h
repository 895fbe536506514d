// Which kernels run: an ordered list of ISAs, the best supported one unless one is forced.
#pragma once
#include <string>
#include <vector>

#include "attention/attention.h"
#include "attention_int8/attention_int8.h"
#include "base/cpu.h"
#include "mask/mask.h"
#include "rowwise/rowwise.h"
#include "screen/screen.h"
#include "ternary/ternary.h"
#include "vocab/vocab.h"

namespace bitnet {

// One table per concept. Floating-point concepts have no VNNI form of their own: avxvnni takes the
// AVX2 table, avx512vnni and amx_int8 the AVX-512 one; ternary products, the screen and attention
// of int8 codes have.  AMX is for ternary products of many rows.
struct Kernels {
  Isa isa;
  const TernaryKernels* ternary;
  const RowwiseKernels* rowwise;
  const VocabKernels* vocab;
  const AttentionKernels* attention;
  const MaskKernels* mask;
  const ScreenKernels* screen;
  const AttentionInt8Kernels* attention_int8;
};

// The kernels in force. The first call reads BITNET_ISA and throws std::runtime_error when it names
// an ISA that is unknown or absent: a forced ISA never falls back.
const Kernels& kernels();

std::vector<Isa> available_isas();      // ascending
void set_isa(const std::string& name);  // throws std::runtime_error; "auto": the best supported

}  // namespace bitnet
