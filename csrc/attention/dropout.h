// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) over
// sixteen counters at once. Include a lanes header first.
#pragma once
#include "base/types.h"

namespace bitnet {
namespace {

struct Philox {
  I16 words[4];
};

// Counters (first + lane, second, third, 0), key (low, high half of seed).
BITNET_INLINE Philox philox(uint32_t first, uint32_t second, uint32_t third, uint64_t seed) {
  alignas(64) int32_t lane[16];
  for (int i = 0; i < 16; ++i) lane[i] = int32_t(first + uint32_t(i));
  I16 c[4] = {load_int(lane), set1_int(int32_t(second)), set1_int(int32_t(third)), set1_int(0)};
  uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
  const I16 a = set1_int(int32_t(0xd2511f53u)), b = set1_int(int32_t(0xcd9e8d57u));
  for (int round = 0; round < 10; ++round) {
    const I16 c0 = c[0], c2 = c[2];
    c[0] = bit_xor(bit_xor(product_high(b, c2), c[1]), set1_int(int32_t(low)));
    c[2] = bit_xor(bit_xor(product_high(a, c0), c[3]), set1_int(int32_t(high)));
    c[1] = product_low(b, c2);
    c[3] = product_low(a, c0);
    low += 0x9e3779b9u;
    high += 0xbb67ae85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// The top 24 bits of the words, as floats.
BITNET_INLINE F16 top_bits(I16 words) {
  return to_float(bit_and(shift_right<8>(words), set1_int(0xffffff)));
}

}  // namespace
}  // namespace bitnet
