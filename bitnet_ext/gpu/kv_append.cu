// Rotary positions and the append to a cache, of rows q | k | v.
//
// q turns in place; k, turned, and v are rounded once into the cache, int8 as codes.cuh says. The
// same bits as the CPU's cache.
#include "paged.cuh"
#include "turned.cuh"

constexpr int kHeads = 4;  // warps of a block, one head each

INLINE void turn_in_place(float* x, const float* cos, const float* sin, int32_t half) {
  for (int32_t i = threadIdx.x; i < half; i += 32) {
    const Turned turned = {x, cos, sin, half};
    const float low = turned(i), high = turned(i + half);
    x[i] = low;
    x[i + half] = high;
  }
}

// grid (rows, ceil((q_heads + 2 kv_heads) / kHeads)), block (32, kHeads)
template <class T>
__global__ void __launch_bounds__(32 * kHeads)
    append_rows(float* qkv,      // [rows][q_heads dk | kv_heads dk | kv_heads dv]
                int64_t stride,  // floats from a row to the next
                const float* cos, const float* sin,  // [positions][dk / 2], or null
                int32_t positions,                   // that cos, or else the cache, has room for
                const int32_t* sequence,             // [rows], or null: row b is sequence b's
                const int32_t* starts, const int32_t* lengths, const uint8_t* active,
                const int32_t* table, int32_t pages_each, int32_t page_tokens, T* keys, T* values,
                float* key_scales, float* value_scales, int32_t q_heads, int32_t kv_heads,
                int32_t dk, int32_t dv, int32_t key_width, int32_t value_width) {
  const int32_t row = blockIdx.x, owner = sequence ? sequence[row] : row;
  const SequenceRows rows = rows_of(starts, lengths, active, owner);
  const int32_t position = rows.held + row - rows.first;
  int32_t head = blockIdx.y * kHeads + threadIdx.y;
  if (rows.count == 0 || position >= positions || head >= q_heads + 2 * kv_heads) return;
  float* vector = qkv + row * stride;
  const float* c = cos ? cos + int64_t(position) * (dk / 2) : nullptr;
  const float* s = cos ? sin + int64_t(position) * (dk / 2) : nullptr;
  if (head < q_heads) {
    if (cos) turn_in_place(vector + int64_t(head) * dk, c, s, dk / 2);
    return;
  }
  head -= q_heads;
  vector += int64_t(q_heads) * dk;
  const Pages pages = {table, pages_each, page_tokens, kv_heads};
  if (head < kv_heads) {
    const int64_t at = page_row(pages, owner, head, position);
    put({vector + int64_t(head) * dk, c, s, dk / 2}, dk, keys + at * key_width, key_width,
        key_scales + at);
    return;
  }
  head -= kv_heads;
  vector += int64_t(kv_heads) * dk;
  const int64_t at = page_row(pages, owner, head, position);
  put({vector + int64_t(head) * dv, nullptr, nullptr, 0}, dv, values + at * value_width,
      value_width, value_scales + at);
}

// lengths[b] += rows of sequence b, at most `limit`. One thread a sequence.
__global__ void advance_lengths(int32_t* lengths, const int32_t* starts, const uint8_t* active,
                                int32_t sequences, int32_t limit) {
  const int32_t b = blockIdx.x * blockDim.x + threadIdx.x;
  if (b >= sequences) return;
  const SequenceRows rows = rows_of(starts, lengths, active, b);
  lengths[b] = min(rows.held + rows.count, limit);
}
