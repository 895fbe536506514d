// The last step where chunks of an array's keys had blocks of their own: a row's states become its
// output.
#pragma once
#include "kinds.cuh"
#include "merge.cuh"

// out from the states of all parts. grid (rows of [batch][q_heads][tq]), a thread a column.
template <class Part>
__global__ void merge_parts(const float* states, void* out, int32_t out_kind, int32_t parts,
                            int32_t dv) {
  const int64_t row = blockIdx.x;
  const int32_t d = threadIdx.x;
  merge_states<Part>(states + row * parts * state_floats<Part>(dv), 0, parts - 1, d, dv,
                     [&](float x) { write(out, out_kind, row * dv + d, x); });
}
