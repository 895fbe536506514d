// The copy of a vocabulary table that the screen reads (screen.cuh).
#include "screen.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kOwn = 16;  // neighbouring elements of a lane

INLINE float max_of_warp(float a) {  // of numbers, or NaN
  return __int_as_float(__reduce_max_sync(0xffffffffu, __float_as_int(a)));
}

INLINE float sum_of_warp(float a) {
  for (int by = 16; by > 0; by /= 2) a = add_rn(a, __shfl_xor_sync(0xffffffffu, a, by));
  return a;
}

// A warp takes a row. Differences are in units of s, each off by less than 2^-16; a lane adds at
// most width / 32 + 16 squares and five more, so a sum is off by less than (width / 16 + 32) 2^-24
// of itself.
// grid (ceil(vocab / kWarps))
template <class T>
__global__ void __launch_bounds__(kThreads)
    screen_pack(const T* table,  // [vocab][stride]
                int64_t stride, int width, int vocab,
                uint32_t* high,  // screen.cuh
                uint32_t* low,
                float* terms)  // [3][vocab]: scale (NaN for a row that is not finite), two errors
{
  const int v = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (v >= vocab) return;
  const T* row = table + v * stride;
  float top = 0.0f;
  for (int e = lane; e < width; e += 32) {
    const float a = magnitude(to_float(row[e]));
    top = __float_as_int(a) > __float_as_int(top) ? a : top;  // NaN stands above infinity
  }
  const float most = max_of_warp(top);
  const bool finite = __float_as_int(most) < 0x7f800000;
  const float scale = finite && most >= 0x1p-100f ? div_rn(most, 127.0f) : 0.0f;

  const int spans = (width + kSpan - 1) / kSpan;
  const int64_t steps = spans * (kSpan / kStep);
  float squares[2] = {};
  for (int at = lane; at < spans * (kSpan / kOwn); at += 32) {
    const int span = at / 4, t = at % 4;
    uint32_t up[2] = {}, down[2] = {};
    for (int i = 0; i < kOwn; ++i) {
      const int e = kSpan * span + kOwn * t + i;
      int32_t code = 128;
      if (e < width && scale != 0.0f) {
        const float quotient = div_rn(to_float(row[e]), scale);
        const int32_t q = round_to_int(quotient);
        code = q + 128;
        const float coarse = sub_rn(quotient, to_float(code / 16 * 16 - 128) + 7.5f);
        const float fine = sub_rn(quotient, to_float(q));
        squares[0] = fma_rn(coarse, coarse, squares[0]);
        squares[1] = fma_rn(fine, fine, squares[1]);
      }
      const int b = 8 * (i % 4);
      up[i / 4 % 2] |= uint32_t(code >> 4) << (b + i / 8 * 4);
      down[i / 8] |= uint32_t(code & 15) << (b + i / 4 % 2 * 4);
    }
    const int64_t tile = (int64_t(v / kTileRows) * spans + span) * 32 + 4 * (v % 8) + t;
    for (int i = 0; i < 2; ++i) {
      high[4 * tile + 2 * i + v / 8 % 2] = up[i];
      low[4 * (v * steps + at / 2) + 2 * (at % 2) + i] = down[i];
    }
  }
  const float growth = 1.0f + to_float(width / 16 + 32) * 0x1p-23f;
  const float off = sqrt_rn(to_float(width)) * 0x1p-16f;
  for (int p = 0; p < 2; ++p) squares[p] = sum_of_warp(squares[p]);
  if (lane != 0) return;
  terms[v] = finite ? scale : __int_as_float(0x7fc00000);
  for (int p = 0; p < 2; ++p)
    terms[(p + 1) * int64_t(vocab) + v] = sqrt_rn(squares[p]) * growth + off;
}
