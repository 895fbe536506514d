// Kernels that try what the emulator makes of Hopper's own instructions.
#include "bulk.cuh"
#include "wgmma.cuh"

// 64 numbers through shared memory, rounds times; kWait: every copy waited for.
template <bool kWait>
__global__ void bulk(int32_t* out, const int32_t* in, int32_t rounds) {
  DYNAMIC_SHARED(shared);
  int32_t* numbers = reinterpret_cast<int32_t*>(shared);
  barrier_t* full = reinterpret_cast<barrier_t*>(shared + 256);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init_fence();
  }
  __syncthreads();
  for (int32_t round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) {
      barrier_arrive_expect(full, 256);
      copy_bulk(numbers, in + 64 * round, 256, full);
    }
    if (kWait) barrier_wait(full, round & 1);
    out[64 * round + threadIdx.x] = numbers[threadIdx.x];
    __syncthreads();
  }
  if (!kWait) barrier_wait(full, rounds & 1 ^ 1);
}

__global__ void no_barrier() {
  DYNAMIC_SHARED(shared);
  barrier_arrive(reinterpret_cast<barrier_t*>(shared));
}

// Nobody brings the bytes.
__global__ void no_bytes() {
  DYNAMIC_SHARED(shared);
  barrier_t* full = reinterpret_cast<barrier_t*>(shared);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_arrive_expect(full, 16);
  }
  __syncthreads();
  barrier_wait(full, 0);
}

// d[64][128] = a[64][32] b[128][32]^T twice over; b is 32 bytes at 64 of columns of 128 bytes.
// kWait: waited for before the sums are read.
template <bool kWait>
__global__ void multiply(int32_t* d, const uint32_t* a, const uint8_t* b) {
  DYNAMIC_SHARED(shared);
  for (int i = threadIdx.x; i < 128 * 32; i += 128) {
    const int n = i / 32, k = 64 + i % 32;
    shared[n * 128 + ((k / 16) ^ (n % 8)) * 16 + k % 16] = b[i];
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint32_t rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = a[(16 * warp + g + i % 2 * 8) * 8 + t + i / 2 * 4];
  int32_t sums[64] = {};
  wgmma_fence();
  wgmma_u8_s8(sums, rows, wgmma_columns(shared, 64));
  wgmma_u8_s8(sums, rows, wgmma_columns(shared, 64));
  wgmma_commit();
  if (kWait) wgmma_wait<0>();
  for (int i = 0; i < 64; ++i)
    d[(16 * warp + g + i / 2 % 2 * 8) * 128 + i / 4 * 8 + 2 * t + i % 2] = sums[i];
  wgmma_wait<0>();
}
