// Reads every word once: the bytes a second that no kernel passes whose data must come from memory.
//
//   out[0] changes only where the words of a thread xor to a value that no buffer gives here.
#include "ptx.cuh"

__global__ void __launch_bounds__(512)
    read_words(uint32_t* out, const uint32_t* memory, int64_t count /* words of 16 bytes */) {
  const uint4* words = reinterpret_cast<const uint4*>(memory);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  uint32_t all = 0;
  for (; i + 3 * step < count; i += 4 * step) {  // four loads in flight
    const uint4 a = words[i], b = words[i + step], c = words[i + 2 * step], d = words[i + 3 * step];
    all ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
    all ^= c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < count; i += step) {
    const uint4 a = words[i];
    all ^= a.x ^ a.y ^ a.z ^ a.w;
  }
  if (all == 0x9e3779b9u) out[0] = all;
}
