// The last step where chunks of keys had blocks of their own: a row's states become its output.
#pragma once
#include "kinds.cuh"
#include "merge.cuh"
#include "paged.cuh"

// out of rows of one token a sequence from the states of their parts; zeros where inactive.
// grid (sequences, q_heads), a thread for each of dv columns
template <class Part>
__global__ void merge_rows(const float* states, float* out, int64_t out_stride, int32_t parts,
                           const int32_t* lengths, const uint8_t* active, int32_t dv,
                           int32_t left) {
  const int32_t row = blockIdx.x, position = lengths[row];
  float* to = out + row * out_stride + int64_t(blockIdx.y) * dv;
  if (active && !active[row]) {
    if (threadIdx.x < dv) to[threadIdx.x] = 0.0f;
    return;
  }
  states += (int64_t(row) * gridDim.y + blockIdx.y) * parts * state_floats<Part>(dv);
  merge_states<Part>(states, lowest_key(position, left) / Part::kChunkKeys,
                     min(position / Part::kChunkKeys, parts - 1), dv,
                     [to](int32_t d, float x) { to[d] = x; });
}

// out from the states of all parts. grid (rows of [batch][q_heads][tq]), a thread a column.
template <class Part>
__global__ void merge_parts(const float* states, void* out, int32_t out_kind, int32_t parts,
                            int32_t dv) {
  const int64_t row = blockIdx.x;
  merge_states<Part>(states + row * parts * state_floats<Part>(dv), 0, parts - 1, dv,
                     [&](int32_t d, float x) { write(out, out_kind, row * dv + d, x); });
}
