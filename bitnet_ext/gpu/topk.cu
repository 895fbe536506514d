// The k largest of each row, in descending order; equal values by ascending id, NaN last: the order
// of csrc/vocab. A key is the value's bits made to ascend, above the complement of the id.
#include "select.cuh"

INLINE uint64_t key_of(const float* row, int i) {
  return uint64_t(ordered(row[i])) << 32 | uint32_t(~i);
}

struct Counted {
  const float* row;
  int wanted;
  INLINE bool key(int i, uint64_t& key, uint64_t& measure) const {
    key = key_of(row, i);
    measure = 1;
    return true;
  }
  INLINE bool reaches(uint64_t sum) const { return sum >= uint64_t(wanted); }
};

// One digit of the k-th largest key.
__global__ void __launch_bounds__(kThreads) topk_digit(const float* values,  // [rows][count]
                                                       int count, int k, int digit,
                                                       void* rows,            // [rows] RowState
                                                       uint64_t* histograms)  // [rows][kBins]
{
  const int64_t m = blockIdx.y;
  const Counted entries = {values + m * count, k};
  select_digit(entries, count, static_cast<RowState*>(rows)[m], histograms + m * kBins, digit);
}

// Keys in shared memory, `size` of them, a power of two, into descending order.
INLINE void sort_descending(uint64_t* keys, int size) {
  for (int run = 2; run <= size; run *= 2)
    for (int apart = run / 2; apart > 0; apart /= 2) {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const int other = i ^ apart;
        const bool descending = (i & run) == 0;
        if (other > i && (keys[i] < keys[other]) == descending) {
          const uint64_t key = keys[i];
          keys[i] = keys[other];
          keys[other] = key;
        }
      }
      __syncthreads();
    }
}

// The entries not below the k-th largest key, sorted by the row's last block.
// shared: `size` keys, the power of two not below k
__global__ void __launch_bounds__(kThreads) topk_collect(const float* values,  // [rows][count]
                                                         int count, int k, int size,
                                                         void* rows,      // [rows] RowState
                                                         uint64_t* keys,  // [rows][k]
                                                         int32_t* ids,    // [rows][k]
                                                         float* largest)  // [rows][k]
{
  DYNAMIC_SHARED(memory);
  uint64_t* sorted = reinterpret_cast<uint64_t*>(memory);
  const int64_t m = blockIdx.y;
  const float* row = values + m * count;
  RowState& state = static_cast<RowState*>(rows)[m];
  const int first = blockIdx.x * kChunk + threadIdx.x * kEach;
  for (int i = first; i < min(first + kEach, count); ++i) {
    const uint64_t key = key_of(row, i);
    if (key >= state.prefix) keys[m * k + atomicAdd(&state.collected, 1u)] = key;
  }
  if (!last_of_row(state)) return;
  if (threadIdx.x == 0) state.collected = 0;
  for (int i = threadIdx.x; i < size; i += kThreads) sorted[i] = i < k ? keys[m * k + i] : 0;
  __syncthreads();
  sort_descending(sorted, size);
  for (int i = threadIdx.x; i < k; i += kThreads) {
    const int id = int(~uint32_t(sorted[i]));
    ids[m * k + i] = id;
    largest[m * k + i] = row[id];
  }
}
