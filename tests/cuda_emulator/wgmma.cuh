// The functions of bitnet_ext/gpu/wgmma.cuh, from the PTX manual ("Register Fragments for
// wgmma.mma_async.m64nNk32", "Matrix Descriptor Format", "Swizzling modes"): computed at the wait,
// when shared memory and registers may last be what they were at the issue.
#pragma once
#include "mma.cuh"

namespace emulated {

struct Wgmma {
  int32_t* d;
  uint32_t a[4];
  uint64_t columns;
};

struct WgmmaQueue {
  std::vector<Wgmma> open;
  std::vector<std::vector<Wgmma>> groups;  // committed, oldest first
};
inline WgmmaQueue wgmma_queues[kMaxThreads];

// The byte of B at column n and byte k from the descriptor's start.
inline int8_t wgmma_column_byte(uint64_t descriptor, int n, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
  const uint32_t group_bytes = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  const int base_offset = int(descriptor >> 49 & 7), layout = int(descriptor >> 62);
  if (layout != 1 || base_offset) fail("wgmma: layout %d, base offset %d", layout, base_offset);
  uint32_t address = start + uint32_t(n / 8) * group_bytes + uint32_t(n % 8) * 128 + uint32_t(k);
  address ^= (address >> 7 & 7) << 4;
  if (address >= machine.shared_bytes) fail("wgmma: reads byte %u of shared memory", address);
  return int8_t(machine.shared[address]);
}

inline void wgmma_compute(Wgmma* const* lanes) {
  constexpr int kRows = 64, kColumns = 128, kDepth = 32, kThreads = 128;
  static int a[kRows][kDepth], b[kColumns][kDepth];
  for (int t = 0; t < kThreads; ++t) {
    if (lanes[t]->columns != lanes[0]->columns) fail("wgmma: descriptors differ in a warpgroup");
    for (int i = 0; i < 16; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + (i / 4 % 2) * 8;
      const int k = t % 4 * 4 + i % 4 + (i >= 8 ? 16 : 0);
      a[row][k] = unsigned_byte(lanes[t]->a[i / 4], i % 4);
    }
  }
  for (int n = 0; n < kColumns; ++n)
    for (int k = 0; k < kDepth; ++k) b[n][k] = wgmma_column_byte(lanes[0]->columns, n, k);
  for (int t = 0; t < kThreads; ++t)
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + (i / 2 % 2) * 8;
      const int n = i / 4 * 8 + t % 4 * 2 + i % 2;
      int32_t sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[n][k];
      lanes[t]->d[i] = int32_t(uint32_t(lanes[t]->d[i]) + uint32_t(sum));
    }
}

inline void wgmma_wait(int pending) {
  WgmmaQueue* mine = &wgmma_queues[machine.current];
  if (!mine->open.empty()) fail("wgmma: waits before it commits");
  together(machine.warpgroups[machine.current / 128], machine.current % 128, ~0u, "wgmma_wait",
           *mine, [&](WgmmaQueue** lanes) {
             while (int(lanes[0]->groups.size()) > pending) {
               for (size_t i = 0; i < lanes[0]->groups.front().size(); ++i) {
                 Wgmma* operands[128];
                 for (int t = 0; t < 128; ++t) operands[t] = &lanes[t]->groups.front().at(i);
                 wgmma_compute(operands);
               }
               for (int t = 0; t < 128; ++t) lanes[t]->groups.erase(lanes[t]->groups.begin());
             }
           });
}

}  // namespace emulated

inline uint64_t wgmma_columns(const uint8_t* shared, int k) {
  return uint64_t(1) << 62 | uint64_t(64) << 32 | uint64_t(1) << 16 |
         uint64_t(shared_address(shared) + uint32_t(k)) >> 4;
}
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& queue = emulated::wgmma_queues[emulated::machine.current];
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
}
template <int kPending>
void wgmma_wait() {
  emulated::wgmma_wait(kPending);
}
inline void wgmma_u8_s8(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t columns) {
  emulated::wgmma_queues[emulated::machine.current].open.push_back(
      {d, {a[0], a[1], a[2], a[3]}, columns});
}
