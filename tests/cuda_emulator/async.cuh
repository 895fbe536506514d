// The functions of bitnet_ext/gpu/async.cuh: copies happen as late as they may.
//
// From its issue to its wait a destination holds no data that a kernel could want, so a read that
// comes too early, or a slot filled while others still read it, shows in the results.
#pragma once
#include "ptx.cuh"

inline uint32_t shared_address(const void* p) {
  const int64_t offset = static_cast<const uint8_t*>(p) - emulated::machine.shared;
  if (offset < 0 || offset >= int64_t(emulated::machine.shared_bytes))
    emulated::fail("address %lld, outside of %zu bytes of dynamic shared memory",
                   static_cast<long long>(offset), emulated::machine.shared_bytes);
  return uint32_t(offset);
}

inline void copy_async(void* to, const void* from, bool valid = true) {
  if (shared_address(to) % 16 || uintptr_t(from) % 16)
    emulated::fail("asynchronous copy off the boundaries of 16 bytes");
  memset(to, 0xa5, 16);
  emulated::self().copies.push_back({to, valid ? from : nullptr, 16});
}

inline void copy_async_commit() {
  auto& thread = emulated::self();
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

template <int kPending>
void copy_async_wait() {
  auto& groups = emulated::self().groups;
  while (groups.size() > kPending) {
    for (const emulated::Copy& copy : groups.front()) {
      if (copy.from)
        memcpy(copy.to, copy.from, copy.bytes);
      else
        memset(copy.to, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}
