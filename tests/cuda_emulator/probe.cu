// Kernels that try the emulator itself: what it must compute, and what it must refuse.
#include "mma.cuh"

// out[lane] = sum over the warp, by a tree of shuffles
__global__ void warp_sum(int32_t* out) {
  int32_t v = int32_t(threadIdx.x * threadIdx.x);
  for (int by = 16; by; by >>= 1) v += __shfl_xor_sync(0xffffffffu, v, by);
  out[threadIdx.x] = v;
}

// Each half of a warp votes for itself.
__global__ void half_votes(uint32_t* out) {
  const bool low = threadIdx.x < 16;
  const uint32_t mask = low ? 0x0000ffffu : 0xffff0000u;
  out[threadIdx.x] = low ? __ballot_sync(mask, threadIdx.x & 1) : __ballot_sync(mask, 1);
}

// out[i] = in[reversed i], through shared memory; kBarrier: with the barrier that this needs.
template <bool kBarrier>
__global__ void reverse(int32_t* out, const int32_t* in) {
  DYNAMIC_SHARED(shared);
  int32_t* all = reinterpret_cast<int32_t*>(shared);
  all[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = all[blockDim.x - 1 - threadIdx.x];
}

// The first warp hands a number to the second through named barriers.
__global__ void hand_over(int32_t* out) {
  __shared__ int32_t number;
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) number = 42;
    named_barrier_arrive(1, 64);
  } else {
    named_barrier_sync(1, 64);
    out[threadIdx.x - 32] = number;
  }
}

__global__ void count(int32_t* out) {
  const int odd = __syncthreads_count(threadIdx.x & 1);
  if (threadIdx.x == 0) atomicAdd(out, odd + __popc(blockIdx.x));
}

// 64 numbers copied beside the arithmetic; kWait: waited for.
template <bool kWait>
__global__ void copy(int32_t* out, const int32_t* in, int32_t valid) {
  DYNAMIC_SHARED(shared);
  int32_t* all = reinterpret_cast<int32_t*>(shared) + 4 * threadIdx.x;
  copy_async(all, in + 4 * threadIdx.x, int32_t(threadIdx.x) < valid);
  copy_async_commit();
  if (kWait) copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = all[i];
  copy_async_wait<0>();
}

// Some threads wait at a barrier for others that wait for them.
__global__ void deadlock() {
  if (threadIdx.x < 32)
    named_barrier_sync(1, 64);
  else
    __syncthreads();
}

__global__ void lost_lane(int32_t* out) {
  if (threadIdx.x < 31) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void beyond(int32_t* out, int32_t i) { out[i] = 1; }

// d[16][8] = a[16][32] b[8][32]^T, a unsigned or signed bytes
template <bool kUnsigned>
__global__ void multiply_bytes(int32_t* d, const uint32_t* a, const uint32_t* b) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t left[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4],
                            a[(g + 8) * 8 + t + 4]};
  const uint32_t right[2] = {b[g * 8 + t], b[g * 8 + t + 4]};
  int32_t sums[4] = {};
  if (kUnsigned)
    mma_u8_s8(sums, left, right);
  else
    mma_s8(sums, left, right);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// d[16][8] = a[16][16] b, loaded by matrices; b [8][16] (columns), or [16][8] transposed on the way
template <class T, bool kTransposed>
__global__ void multiply_halves(float* d, const uint32_t* a, const uint32_t* b) {
  DYNAMIC_SHARED(shared);
  uint32_t* words = reinterpret_cast<uint32_t*>(shared);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 128; i += 32) words[i] = a[i];
  for (int i = lane; i < 64; i += 32) words[128 + i] = b[i];
  __syncwarp();
  // matrices of A: rows 0-7 k 0-7, rows 8-15 k 0-7, rows 0-7 k 8-15, rows 8-15 k 8-15
  uint32_t left[4], right[4];
  load_matrices(left, shared + lane % 16 * 32 + lane / 16 * 16);
  const uint8_t* columns = shared + 512;
  if (kTransposed)
    load_matrices_transposed(right, columns + lane % 16 * 16);
  else
    load_matrices(right, columns + lane % 8 * 32 + lane / 8 % 2 * 16);
  const uint32_t pair[2] = {right[0], right[1]};
  float sums[4] = {};
  mma_half<T>(sums, left, pair);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// One number through every conversion.
__global__ void convert(const float* in, half_t* half, bfloat_t* bfloat, float* back,
                        int32_t* whole) {
  const float x = in[threadIdx.x];
  half[threadIdx.x] = from_float<half_t>(x);
  bfloat[threadIdx.x] = from_float<bfloat_t>(x);
  back[2 * threadIdx.x] = to_float(half[threadIdx.x]);
  back[2 * threadIdx.x + 1] = to_float(bfloat[threadIdx.x]);
  whole[threadIdx.x] = round_to_int(x);
}
