// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the bits
// of csrc/attention/dropout.h.
#pragma once
#include "ptx.cuh"

struct Philox {
  uint32_t words[4];
};

// Counter (first, second, third, 0), key (low, high half of seed).
INLINE Philox philox(uint32_t first, uint32_t second, uint32_t third, uint64_t seed) {
  uint32_t c[4] = {first, second, third, 0};
  uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xd2511f53u) * c[0], b = uint64_t(0xcd9e8d57u) * c[2];
    c[0] = uint32_t(b >> 32) ^ c[1] ^ low;
    c[1] = uint32_t(b);
    c[2] = uint32_t(a >> 32) ^ c[3] ^ high;
    c[3] = uint32_t(a);
    low += 0x9e3779b9u;
    high += 0xbb67ae85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}
