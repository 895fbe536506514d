// Barriers in shared memory that count bytes, and the copies that complete on them (sm_90 on).
//
// A barrier's phases alternate in parity, from 0. A phase ends when all its arrivals and all the
// bytes that they announced have come.
#pragma once
#include "async.cuh"

using barrier_t = uint64_t;

// One thread, before a barrier of the block.
INLINE void barrier_init(barrier_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After the inits, by the thread that made them: copies see them.
INLINE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

INLINE void barrier_arrive(barrier_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrive, and announce bytes that copies will bring.
INLINE void barrier_arrive_expect(barrier_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Until the phase of that parity has ended.
INLINE void barrier_wait(barrier_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copy `bytes`, a multiple of 16, both ends on 16-byte boundaries; one thread for all of them.
INLINE void copy_bulk(void* to, const void* from, int bytes, barrier_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
