// Copies from global to shared memory that run beside the arithmetic (sm_80 on).
#pragma once
#include "ptx.cuh"

// The address that instructions take for shared memory.
INLINE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copy 16 bytes, both ends on 16-byte boundaries; zeros, and no read, where `valid` is false.
// Nothing may touch `to` before a wait for the copy's group, and a barrier for other threads.
INLINE void copy_async(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Close a group: this thread's copies since the last one.
INLINE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's groups, the newest, are under way.
template <int kPending>
INLINE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
