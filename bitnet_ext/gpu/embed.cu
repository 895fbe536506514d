// Rows of the embedding table, and of the position table where a model has
// learned positions:
//
//   out[m][e] = table[ids[m]][e] + positions[at[m]][e]
//
// Ids and positions are read from device memory, so that a captured graph
// embeds any token. One sum rounded once: the CPU's bits. An id outside the
// table gives a row of NaN.
#include "ptx.cuh"

constexpr int kThreads = 256;

INLINE float to_float(int8_t a) { return to_float(int32_t(a)); }

// grid (rows)
template <class T>
__global__ void __launch_bounds__(kThreads) embed(const T* table,  // [V][stride]
                                                  int64_t stride,
                                                  const int32_t* ids,      // [rows]
                                                  const float* positions,  // [P][width] or null
                                                  const int32_t* at,       // [rows]
                                                  float* out,              // [rows][width]
                                                  int vocab, int width) {
  const int64_t m = blockIdx.x;
  const int32_t id = ids[m];
  if (id < 0 || id >= vocab) {
    for (int e = threadIdx.x; e < width; e += kThreads)
      out[m * width + e] = __int_as_float(0x7fc00000);
    return;
  }
  const T* row = table + id * stride;
  const float* position = positions ? positions + int64_t(at[m]) * width : nullptr;
  for (int e = threadIdx.x; e < width; e += kThreads) {
    const float value = to_float(row[e]);
    out[m * width + e] = position ? add_rn(value, position[e]) : value;
  }
}
