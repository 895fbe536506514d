// States of attention over chunks of keys, and their merging in ascending order.
//
// A state in memory: m, l[kLanes], o[dv]. Part says how many partial sums l has, and the
// exponential in which m is counted. The state of a row is the same whether a block went over all
// chunks or each chunk had a block of its own:
//
//   top = max(m1, m2);  l, o = part * factor(m2 - top) + total * factor(m1 - top)
//
// A state that saw no key, m = -inf and the rest 0, changes nothing.
#pragma once
#include "math.cuh"

struct ExactPart {  // the CPU's bits
  static constexpr int kLanes = 16, kChunkKeys = 512;
  static INLINE float factor(float x) { return exp_rn(x); }
};
struct HalfPart {
  static constexpr int kLanes = 4, kChunkKeys = 256;
  static INLINE float factor(float x) { return exp2_approx(x); }
};

template <class Part>
INLINE int64_t state_floats(int32_t dv) {
  return 1 + Part::kLanes + int64_t(dv);
}

// What a total and a part are multiplied by.
struct Factors {
  float total, part;
};
template <class Part>
INLINE Factors join(float& m, float part_m) {
  const float top = m > part_m ? m : part_m, shift = top == -INFINITY_F ? 0.0f : top;
  const Factors by = {Part::factor(sub_rn(m, shift)), Part::factor(sub_rn(part_m, shift))};
  m = top;
  return by;
}
INLINE float joined(float total, float part, Factors by) {
  return fma_rn(part, by.part, mul_rn(total, by.total));
}

// The sum of kLanes neighbouring threads' x, by one tree: x[i] + x[i + half], and so on.
template <int kLanes>
INLINE float sum_of_lanes(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    x = add_rn(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Zero where no key was seen.
INLINE float divided(float o, float sum) { return sum == 0.0f ? 0.0f : div_rn(o, sum); }

// A key as one of `keys`, or their end.
INLINE int32_t clamp(int64_t key, int32_t keys) {
  return int32_t(key < 0 ? 0 : key > keys ? keys : key);
}

// Keys of a row that stands at `position`; negative `left`: all before it.
INLINE int32_t lowest_key(int32_t position, int32_t left) {
  return left < 0 ? 0 : max(position - left, 0);
}

// write(o / l) of the states of chunks first..last at column d, which a thread has that is below
// dv; whole warps take part.
template <class Part, class Write>
INLINE void merge_states(const float* states, int32_t first, int32_t last, int32_t d, int32_t dv,
                         Write write) {
  const int32_t lane = threadIdx.x % Part::kLanes;
  float m = -INFINITY_F, l = 0.0f, o = 0.0f;
  for (int32_t chunk = first; chunk <= last; ++chunk) {
    const float* part = states + chunk * state_floats<Part>(dv);
    const Factors by = join<Part>(m, part[0]);
    l = joined(l, part[1 + lane], by);
    o = joined(o, d < dv ? part[1 + Part::kLanes + d] : 0.0f, by);
  }
  const float sum = sum_of_lanes<Part::kLanes>(l);
  if (d < dv) write(divided(o, sum));
}

// Whether this block is the last of `blocks` to come here, and so sees what the others wrote
// before. The ticket is zero before the first, and again after the last.
INLINE bool comes_last(int32_t* ticket, int32_t blocks) {
  __shared__ bool last;
  __syncthreads();  // all of this block has written
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1) == blocks - 1;
    if (last) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}
