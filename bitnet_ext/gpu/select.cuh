// Selection among the entries of a row by their 64-bit keys, in chunks over many blocks.
//
// Entries have keys, all different where it matters, and integer measures: 1 each, or weights. From
// the largest key down, measures are added; the key selected is the first at which the sum
// `reaches` what is wanted. It is found digit by digit: a histogram of measures over the digit of
// the entries that share the digits found so far, then the bin in which the sum reaches. Sums are
// integers, so their order does not show.
//
// Every kernel here has grid (chunks, rows): a block takes kChunk neighbouring entries of a row,
// and the last block of a row to finish draws the conclusion.
#pragma once
#include "ptx.cuh"

constexpr int kThreads = 256;
constexpr int kEach = 4;  // neighbouring entries of a thread
constexpr int kChunk = kThreads * kEach;
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kDigits = 6;  // 5 * 11 + 9 = 64

// What kernels leave for one another about a row. Zeros at first; `arrived` and the histogram are
// zeros again after each kernel.
struct alignas(64) RowState {
  uint64_t prefix;  // the digits of the selected key found so far, or all
  uint64_t above;   // the measures of all keys above it
  uint64_t total;   // of the weights of the row
  double highest;   // of its entries
  int32_t token;    // the entry chosen
  uint32_t arrived;
  uint32_t collected;
};

// ---- keys that order as numbers do; NaN below all

INLINE uint64_t ordered(double x) {
  const uint64_t bits = uint64_t(__double_as_longlong(x));
  return x == x ? bits ^ (bits >> 63 ? ~uint64_t(0) : uint64_t(1) << 63) : 0;
}

INLINE double number_of(uint64_t key) {
  return __longlong_as_double(int64_t(key >> 63 ? key ^ uint64_t(1) << 63 : ~key));
}

// -0 orders as 0.
INLINE uint32_t ordered(float x) {
  if (x != x) return 0;
  const uint32_t bits = __float_as_uint(x) == 0x80000000u ? 0 : __float_as_uint(x);
  return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}

// ---- the block

// Inclusive sum over the block's threads in order; `warps`: [kThreads / 32] of shared memory.
INLINE uint64_t block_scan(uint64_t value, uint64_t* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int by = 1; by < 32; by *= 2) {
    const uint64_t before = __shfl_up_sync(0xffffffffu, value, by);
    if (lane >= by) value += before;
  }
  __syncthreads();  // who read `warps` before has done so
  if (lane == 31) warps[warp] = value;
  __syncthreads();
  for (int i = 0; i < warp; ++i) value += warps[i];
  return value;
}

// Whether this is the last of the row's blocks: what the others wrote is then visible.
INLINE bool last_of_row(RowState& row) {
  __threadfence();
  __syncthreads();
  uint32_t before = 0;
  if (threadIdx.x == 0) before = atomicAdd(&row.arrived, 1u);
  const bool last = __syncthreads_or(threadIdx.x == 0 && before == gridDim.x - 1);
  if (last && threadIdx.x == 0) row.arrived = 0;
  __threadfence();
  return last;
}

// ---- one digit

// Entries has
//   bool key(int i, uint64_t& key, uint64_t& measure)   entry i; false: not in the running
//   bool reaches(uint64_t sum)                          sum > 0, and monotone
// Measures are below 2^44, so the low and high 22 bits of a chunk's fit 32 bits each.
template <class Entries>
INLINE void select_digit(const Entries& entries, int count, RowState& row, uint64_t* histogram,
                         int digit) {
  __shared__ uint32_t low[kBins], high[kBins];
  __shared__ uint64_t warps[kThreads / 32];
  const int last_digit = kDigits - 1;
  const int bits = digit < last_digit ? kDigitBits : 64 - last_digit * kDigitBits;
  const int shift = digit < last_digit ? 64 - (digit + 1) * kDigitBits : 0;
  const uint64_t prefix = digit == 0 ? 0 : row.prefix, above = digit == 0 ? 0 : row.above;

  for (int i = threadIdx.x; i < kBins; i += kThreads) low[i] = high[i] = 0;
  __syncthreads();
  const int first = blockIdx.x * kChunk + threadIdx.x * kEach;
  for (int i = first; i < min(first + kEach, count); ++i) {
    uint64_t key, measure;
    if (!entries.key(i, key, measure)) continue;
    if (digit > 0 && (key ^ prefix) >> (shift + bits) != 0) continue;
    const int bin = int(key >> shift) & (kBins - 1) & ((1 << bits) - 1);
    atomicAdd(&low[bin], uint32_t(measure) & 0x3fffffu);
    if (measure >> 22) atomicAdd(&high[bin], uint32_t(measure >> 22));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    const uint64_t sum = low[i] + (uint64_t(high[i]) << 22);
    if (sum) atomicAdd(&histogram[i], sum);
  }
  if (!last_of_row(row)) return;

  // From the highest bin down, kBins / kThreads neighbours a thread.
  constexpr int kOwn = kBins / kThreads;
  uint64_t own[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int bin = kBins - 1 - (threadIdx.x * kOwn + i);
    own[i] = histogram[bin];
    histogram[bin] = 0;
    sum += own[i];
  }
  uint64_t held = above + block_scan(sum, warps) - sum;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!entries.reaches(held) && entries.reaches(held + own[i])) {
      const int bin = kBins - 1 - (threadIdx.x * kOwn + i);
      row.prefix = prefix | uint64_t(bin) << shift;
      row.above = held;
    }
    held += own[i];
  }
}
