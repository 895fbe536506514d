// Causal masks. Query i stands at d = i + past and attends to
//
//   key < prefix   or   d - left <= key <= d,      where key < k_len and i < q_len
//
// The rest of a row, and rows from q_len on, is padding and hidden. A fill is nothing but writes:
// each thread writes whole words of 16 bytes, neighbours in a warp neighbouring ones.
#include "ptx.cuh"

constexpr int kWord = 16;                // bytes
constexpr int kColumns = 32, kRows = 8;  // threads of a block
constexpr int kWordsEach = 4;            // words of a row that a thread fills in one step

// What a row attends to: [0, prefix) and [begin, end).
struct Runs {
  int64_t prefix, begin, end;
};

INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Element: the bits of a value. Elements first .. first + 16 / sizeof(Element) - 1 of a row.
template <class Element>
INLINE void fill_word(Element* row, int64_t first, int64_t width, Runs runs, Element attend,
                      Element hide) {
  constexpr int kEach = kWord / sizeof(Element);
  const int prefix = int(clamp(runs.prefix - first, 0, kEach));
  const int begin = int(clamp(runs.begin - first, 0, kEach));
  const int end = int(clamp(runs.end - first, 0, kEach));
  alignas(kWord) Element word[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) word[i] = i < prefix || (i >= begin && i < end) ? attend : hide;
  if (first >= 0 && first + kEach <= width) {
    *reinterpret_cast<Words4*>(row + first) = *reinterpret_cast<const Words4*>(word);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (first + i >= 0 && first + i < width) row[first + i] = word[i];
  }
}

// grid (ceil(rows / kRows), columns in steps), block (kColumns, kRows)
template <class Element>
__global__ void __launch_bounds__(kColumns* kRows)
    fill_mask(Element* out,  // [rows][width], rows `stride` elements apart
              int64_t rows, int64_t width, int64_t stride, int64_t q_len, int64_t k_len,
              int64_t past,
              int64_t left,  // keys seen before d; -1: all
              int64_t prefix, Element attend, Element hide) {
  constexpr int kEach = kWord / sizeof(Element);
  const int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.y;
  if (i >= rows) return;
  const int64_t d = i + past;
  Runs runs = {0, 0, 0};
  if (i < q_len)
    runs = {min(prefix, k_len), left < 0 ? 0 : max(d - left, int64_t(0)), min(d + 1, k_len)};
  Element* row = out + i * stride;
  // Words lie on their boundaries: the first may begin before the row.
  const int64_t before = int64_t(uint64_t(row) / sizeof(Element) % kEach);
  const int64_t words = (before + width + kEach - 1) / kEach;
  for (int64_t step = blockIdx.y; step * kColumns * kWordsEach < words; step += gridDim.y) {
#pragma unroll
    for (int j = 0; j < kWordsEach; ++j) {
      const int64_t word = (step * kWordsEach + j) * kColumns + threadIdx.x;
      if (word < words) fill_word(row, word * kEach - before, width, runs, attend, hide);
    }
  }
}
