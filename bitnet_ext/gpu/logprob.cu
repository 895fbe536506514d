// The log-probability of one target in each row of logits, with the CPU's bits
// (csrc/rowwise/rowwise_impl.h):
//
//   y[m] = (x[m][t] - max) - log(sum over v of exp(x[m][v] - max)),   t = targets[m]
//   greedy[m] = whether t is the first of the row's largest
//
// The sum has sixteen lanes (lane = v mod 16) over stretches of 512, each in ascending order, and
// those sums over the row. A row with NaN or +inf, or all -inf, gives NaN.
#include "math.cuh"

constexpr int kThreads = 512, kLanes = 16, kStretch = 512;
constexpr int kGroups = kThreads / kLanes;  // stretches at a time

// log x = e log 2 + log m, m in [sqrt(1/2), sqrt(2)), log m = f - f^2 / 2 + f^3 P(f), f = m - 1.
INLINE float log_rn(float x) {
  const bool tiny = x < 0x1p-126f;
  const int32_t bits = __float_as_int(tiny ? mul_rn(x, 0x1p24f) : x);
  const int32_t e = (bits - 0x3f3504f3) >> 23;  // steps at sqrt(1/2)
  const float f = sub_rn(__int_as_float(bits - int32_t(uint32_t(e) << 23)), 1.0f);
  const float k = sub_rn(to_float(e), tiny ? 24.0f : 0.0f);
  const float p =
      poly(f, 0x1.555546p-2f, -0x1.fffff8p-3f, 0x1.99a524p-3f, -0x1.555fbep-3f, 0x1.233318p-3f,
           -0x1.fbbf34p-4f, 0x1.e6d1b8p-4f, -0x1.e02114p-4f, 0x1.16a74ap-4f);
  const float z = mul_rn(f, f);
  float tail = fma_rn(mul_rn(f, z), p, mul_rn(k, 0x1.7f7d1cp-20f));
  tail = fma_rn(z, -0.5f, tail);
  const float y = fma_rn(k, 0x1.62e4p-1f, add_rn(f, tail));
  if (x == 0.0f) return -INFINITY_F;
  if (x < 0.0f) return __int_as_float(0x7fc00000);
  return x < INFINITY_F ? y : x;
}

// The largest number of a row, for every thread.
INLINE float row_max(const float* row, int vocab, float* warps) {
  float top = -INFINITY_F;
  for (int i = threadIdx.x; i < vocab; i += kThreads) top = max_num(top, row[i]);
  for (int by = 16; by > 0; by /= 2) top = max_num(top, __shfl_xor_sync(0xffffffffu, top, by));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = top;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; ++i) top = max_num(top, warps[i]);
  return top;
}

// grid (rows)
__global__ void __launch_bounds__(kThreads) gather_logprobs(const float* logits,  // [rows][vocab]
                                                            const int32_t* targets,  // [rows]
                                                            float* logprobs,         // [rows]
                                                            uint8_t* greedy,         // [rows]
                                                            int vocab) {
  __shared__ float warps[kThreads / 32];
  __shared__ float sums[kGroups][kLanes];
  const int64_t m = blockIdx.x;
  const float* row = logits + m * vocab;
  const float top = row_max(row, vocab, warps);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;

  float total = 0.0f;  // lanes 0..15 of the block's first threads
  for (int begin = 0; begin < vocab; begin += kGroups * kStretch) {
    const int first = begin + group * kStretch, end = min(first + kStretch, vocab);
    float sum = 0.0f;
    for (int i = first + lane; i < end; i += kLanes) sum = add_rn(sum, exp_rn(sub_rn(row[i], top)));
    sums[group][lane] = sum;
    __syncthreads();
    if (threadIdx.x < kLanes)
      for (int i = 0; i < kGroups && begin + i * kStretch < vocab; ++i)
        total = add_rn(total, sums[i][lane]);
    __syncthreads();
  }

  const int target = targets[m];
  int before = 0;  // of the same value as the largest
  for (int i = threadIdx.x; i < target; i += kThreads) before |= row[i] == top;
  before = __syncthreads_or(before);
  if (threadIdx.x >= kLanes) return;
  for (int by = kLanes / 2; by > 0; by /= 2)
    total = add_rn(total, __shfl_xor_sync(0xffffu, total, by));
  if (threadIdx.x != 0) return;
  const float y = sub_rn(sub_rn(row[target], top), log_rn(total));
  logprobs[m] = y == y ? y : __int_as_float(0x7fc00000);
  greedy[m] = total == total && row[target] == top && !before;
}
