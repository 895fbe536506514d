// The functions of bitnet_ext/gpu/bulk.cuh: a copy happens when somebody waits for it.
#pragma once
#include <map>

#include "async.cuh"

using barrier_t = uint64_t;

namespace emulated {

struct CountingBarrier {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;  // announced, less those that came
  uint32_t parity = 0;
  std::vector<Copy> copies;
};

// Those of the block under way, by offset in shared memory.
inline std::map<uint32_t, CountingBarrier>& counting_barriers() {
  static std::map<uint32_t, CountingBarrier> barriers;
  static uint64_t block = 0;
  if (block != machine.blocks) barriers.clear();
  block = machine.blocks;
  return barriers;
}

inline CountingBarrier& counting_barrier(barrier_t* barrier) {
  const auto found = counting_barriers().find(shared_address(barrier));
  if (found == counting_barriers().end()) fail("a barrier that was not initialised");
  return found->second;
}

inline void barrier_arrive(CountingBarrier& b, int64_t bytes) {
  if (--b.missing < 0) fail("more arrivals than the barrier has");
  b.bytes += bytes;
  machine.moved = true;
}

}  // namespace emulated

inline void barrier_init(barrier_t* barrier, int arrivals) {
  if (shared_address(barrier) % 8) emulated::fail("a barrier off its boundary of 8 bytes");
  emulated::counting_barriers()[shared_address(barrier)] = {arrivals, arrivals, 0, 0, {}};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(barrier_t* barrier) {
  emulated::barrier_arrive(emulated::counting_barrier(barrier), 0);
}
inline void barrier_arrive_expect(barrier_t* barrier, int bytes) {
  emulated::barrier_arrive(emulated::counting_barrier(barrier), bytes);
}

inline void barrier_wait(barrier_t* barrier, uint32_t parity) {
  emulated::CountingBarrier& b = emulated::counting_barrier(barrier);
  emulated::wait_until("a counting barrier", [&] {
    if (b.parity != parity) return true;
    if (b.missing) return false;
    for (const emulated::Copy& copy : b.copies) {
      memcpy(copy.to, copy.from, copy.bytes);
      b.bytes -= int64_t(copy.bytes);
    }
    b.copies.clear();
    if (b.bytes) return false;
    b.parity ^= 1;
    b.missing = b.arrivals;
    return true;
  });
}

inline void copy_bulk(void* to, const void* from, int bytes, barrier_t* barrier) {
  if (shared_address(to) % 16 || uintptr_t(from) % 16 || bytes % 16)
    emulated::fail("bulk copy off the boundaries of 16 bytes");
  if (bytes > 0) shared_address(static_cast<uint8_t*>(to) + bytes - 1);
  memset(to, 0xa5, size_t(bytes));
  emulated::counting_barrier(barrier).copies.push_back({to, from, size_t(bytes)});
}
