// Rows of a mask over vectors of kWords words of 32 bits that the including file defines, with
// set1, indices (0, 1, ...), store and
//
//   pick(index, count, a, b)  in each lane a where index < count, else b
//
// Vectors lie on cache lines, as one that crosses two costs a second store. Those inside a run hold
// one value; the others choose lane by lane, so no branch depends on where in a vector a run ends.
// The first and the last vector of a row overlap their neighbours. Words that hold elements of two
// runs, and bytes outside whole words, are written again by element.
#pragma once
#include "mask/mask.h"

namespace bitnet {
namespace {

constexpr int64_t kShortRow = 8;                  // vectors that choose faster than they branch
constexpr int64_t kWidestRow = int64_t(1) << 32;  // bytes; beyond, indices would not fit 32 bits

BITNET_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// What a row attends to: [0, prefix) and [begin, end), prefix <= begin <= end.
struct Runs {
  int64_t prefix, begin, end;
};

// kWhole: prefix and begin are 0.
template <bool kWhole>
BITNET_INLINE Runs runs_of(const MaskPattern& p, int64_t i) {
  if (i >= p.q_len) return {0, 0, 0};
  if (kWhole) return {0, 0, clamp(i + p.past + 1, 0, p.k_len)};
  const int64_t diagonal = i + p.past, prefix = clamp(p.prefix, 0, p.k_len);
  const int64_t end = clamp(diagonal + 1, prefix, p.k_len);
  return {prefix, p.left == kUnbounded ? prefix : clamp(diagonal - p.left, prefix, end), end};
}

// Elements [from, to) of a row, one after the other.
template <int kSize>
BITNET_INLINE void fill_elements(uint8_t* row, const MaskPattern& p, Runs runs, int64_t from,
                                 int64_t to) {
  for (int64_t key = from; key < to; ++key) {
    const bool attends = key < runs.prefix || (key >= runs.begin && key < runs.end);
    const uint32_t bits = attends ? p.attend : p.hide;
    __builtin_memcpy(row + key * kSize, &bits, kSize);
  }
}

// `words` >= kWords of them from p on; runs in words.
template <bool kWhole>
BITNET_INLINE void fill_words(uint8_t* p, int64_t words, Runs runs, Words attend, Words hide) {
  // Lanes count from i, so that the limits move and the indices stay.
  const auto left = [](int64_t end, int64_t i) { return set1(int32_t(end - i)); };
  const auto put = [&](int64_t i) {
    Words value = pick(indices(), left(runs.end, i), attend, hide);
    if (!kWhole) {
      value = pick(indices(), left(runs.begin, i), hide, value);
      value = pick(indices(), left(runs.prefix, i), attend, value);
    }
    store(p + 4 * i, value);
  };
  if (kWhole && words <= kShortRow * kWords) {
    int64_t i = 0;
    for (; i + kWords <= words; i += kWords) put(i);
    if (i < words) put(words - kWords);
    return;
  }
  const int64_t into = int64_t(reinterpret_cast<uintptr_t>(p) / 4 % kWords);
  int64_t i = into ? kWords - into : 0;
  if (into) put(0);
  const auto repeat = [&](int64_t end, Words value) {
    for (; i + 4 * kWords <= end; i += 4 * kWords)
      for (int j = 0; j < 4; ++j) store(p + 4 * (i + j * kWords), value);
    for (; i + kWords <= end; i += kWords) store(p + 4 * i, value);
  };
  // Up to the end of a run in whole vectors, and the vector that holds it.
  const auto run = [&](int64_t end, Words value) {
    repeat(end, value);
    if (i < end && i + kWords <= words) {
      put(i);
      i += kWords;
    }
  };
  if (!kWhole) {
    run(runs.prefix, attend);
    run(runs.begin, hide);
  }
  run(runs.end, attend);
  repeat(words, hide);
  if (i < words) put(words - kWords);
}

// A row of at least kWords whole words; head: bytes before the first of them.
template <int kSize, bool kWhole>
BITNET_INLINE void fill_wide_row(uint8_t* row, const MaskPattern& p, Runs runs, int64_t head,
                                 int64_t words) {
  const auto word_of = [&](int64_t key) { return (key * kSize - head) >> 2; };
  const auto inside = [&](int64_t key) { return kSize == 4 ? key : clamp(word_of(key), 0, words); };
  fill_words<kWhole>(row + head, words, {inside(runs.prefix), inside(runs.begin), inside(runs.end)},
                     set1(int32_t(p.attend)), set1(int32_t(p.hide)));
  if (kSize == 4) return;
  const int64_t each = 4 / kSize, offset = head / kSize;
  fill_elements<kSize>(row, p, runs, 0, offset);
  const int64_t keys[] = {runs.end, runs.begin, runs.prefix};
  for (int k = 0; k < (kWhole ? 1 : 3); ++k) {
    const int64_t from = offset + word_of(keys[k]) * each;
    if (from >= offset && from != keys[k])
      fill_elements<kSize>(row, p, runs, from, clamp(from + each, from, p.width));
  }
  fill_elements<kSize>(row, p, runs, offset + words * each, p.width);
}

template <int kSize, bool kWhole>
void fill_rows(uint8_t* out, const MaskPattern& p, int64_t begin, int64_t end) {
  const int64_t bytes = p.width * kSize;
  for (int64_t i = begin; i < end; ++i) {
    uint8_t* row = out + i * p.stride;
    const Runs runs = runs_of<kWhole>(p, i);
    const int64_t address = int64_t(reinterpret_cast<uintptr_t>(row));
    const int64_t head = kSize < 4 && address % kSize == 0 ? -address & 3 : 0;
    const int64_t words = (bytes - head) >> 2;
    if (words >= kWords && bytes <= kWidestRow)
      fill_wide_row<kSize, kWhole>(row, p, runs, head, words);
    else
      fill_elements<kSize>(row, p, runs, 0, p.width);
  }
}

template <int kSize>
void fill_sized(uint8_t* out, const MaskPattern& p, int64_t begin, int64_t end) {
  if (p.prefix == 0 && p.left == kUnbounded)
    fill_rows<kSize, true>(out, p, begin, end);
  else
    fill_rows<kSize, false>(out, p, begin, end);
}

void fill(void* out, const MaskPattern* pattern, int64_t begin, int64_t end) {
  uint8_t* rows = static_cast<uint8_t*>(out);
  if (pattern->element_size == 4) return fill_sized<4>(rows, *pattern, begin, end);
  if (pattern->element_size == 2) return fill_sized<2>(rows, *pattern, begin, end);
  fill_sized<1>(rows, *pattern, begin, end);
}

}  // namespace
}  // namespace bitnet
