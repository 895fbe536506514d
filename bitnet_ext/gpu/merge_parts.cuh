// The last step where chunks of an array's keys had blocks of their own: a row's states become its
// output.
#pragma once
#include "kinds.cuh"
#include "merge.cuh"

// Where attention over arrays writes: element strides of batch, head and row; contiguous columns.
struct OutRows {
  void* data;
  int32_t kind;
  int64_t batch, head, row;
  INLINE void write(int32_t b, int32_t h, int32_t r, int32_t column, float x) const {
    ::write(data, kind, b * batch + h * head + r * row + column, x);
  }
};

// out from the states of all parts. grid (rows of [batch][heads][tq]), a thread a column.
template <class Part>
__global__ void merge_parts(const float* states, void* out, int32_t kind, int64_t out_batch,
                            int64_t out_head, int64_t out_row, int32_t parts, int32_t heads,
                            int32_t tq, int32_t dv) {
  const OutRows to = {out, kind, out_batch, out_head, out_row};
  const int64_t row = blockIdx.x;
  const int32_t head = int32_t(row / tq), d = threadIdx.x;  // head: of those of all sequences
  merge_states<Part>(
      states + row * parts * state_floats<Part>(dv), 0, parts - 1, d, dv,
      [&](float x) { to.write(head / heads, head % heads, int32_t(row % tq), d, x); });
}
