// Where the keys and values of a DeviceCache lie, and the rows of a call.
//
// One layer of the cache, with w the width of a vector rounded up to whole 16 bytes, zeros past it:
//
//   keys, values            T [pages][kv_heads][page_tokens][w]
//   key_scales, ..          float32 [pages][kv_heads][page_tokens], int8 only: value = code * scale
//   table                   int32 [sequences][pages_each]: token t is in page t / page_tokens
//
// page_tokens is a multiple of 64, so that no block of 64 tokens crosses a page. The plain case is
// one page a sequence, as long as the longest.
#pragma once
#include "ptx.cuh"

struct Pages {
  const int32_t* table;
  int32_t pages_each, page_tokens, kv_heads;
};

// The row of [pages][kv_heads][page_tokens] that holds a token.
INLINE int64_t page_row(Pages pages, int32_t sequence, int32_t head, int32_t token) {
  const int64_t page =
      pages.table[int64_t(sequence) * pages.pages_each + token / pages.page_tokens];
  return (page * pages.kv_heads + head) * pages.page_tokens + token % pages.page_tokens;
}

// A sequence's rows in a call, and the tokens that it held before. Row i of them stands at position
// `held` + i. Without `starts` row b is the one of sequence b; inactive sequences have none.
struct SequenceRows {
  int32_t first, count, held;
};
INLINE SequenceRows rows_of(const int32_t* starts,   // [sequences + 1] or null
                            const int32_t* lengths,  // [sequences]
                            const uint8_t* active,   // [sequences] or null: all
                            int32_t sequence) {
  SequenceRows rows = {sequence, 1, lengths[sequence]};
  if (starts) {
    rows.first = starts[sequence];
    rows.count = starts[sequence + 1] - rows.first;
  }
  if (active && !active[sequence]) rows.count = 0;
  return rows;
}
