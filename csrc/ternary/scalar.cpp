// The definition of the ternary kernels: what blocked.h unpacks, multiplied and added.
#include "base/lanes_scalar.h"
#include "ternary/blocked.h"

namespace bitnet {
namespace {

struct Scalar {
  static constexpr int rows = 4, gemv_rows = 1, gemv_group = 1, gemv_group5 = gemv_group,
                       step = 320;
  static constexpr bool dense = false;

  template <int R>
  static void tile(const uint8_t* codes, int64_t quads, const int8_t* q, int64_t q_stride,
                   bool fresh, int32_t* acc) {
    for (int r = 0; r < R; ++r) {
      int32_t* a = acc + r * kPanel;
      if (fresh)
        for (int o = 0; o < kPanel; ++o) a[o] = 0;
      for (int64_t t = 0; t < quads; ++t) {
        const int8_t* x = q + r * q_stride + 4 * t;
        const uint8_t* c = codes + t * kBlockBytes;
        for (int o = 0; o < kPanel; ++o)
          a[o] += c[4 * o] * x[0] + c[4 * o + 1] * x[1] + c[4 * o + 2] * x[2] + c[4 * o + 3] * x[3];
      }
    }
  }

  static void gemv2(const uint8_t* packed, int64_t blocks, int64_t, const int8_t* q, int64_t, int,
                    int32_t* acc) {
    uint8_t codes[4 * kBlockBytes];
    for (int64_t b = 0; b < blocks; ++b) {
      unpack2(packed + b * kBlockBytes, codes);
      tile<1>(codes, 4, q + 16 * b, 0, b == 0, acc);
    }
  }

  static void gemv5(const uint8_t* packed, int64_t blocks, int64_t, const int8_t* q, int64_t, int,
                    int32_t* acc) {
    uint8_t codes[5 * kBlockBytes];
    for (int64_t b = 0; b < blocks; ++b) {
      unpack5(packed + b * kBlockBytes, codes);
      tile<1>(codes, 5, q + 20 * b, 0, b == 0, acc);
    }
  }
};

}  // namespace

const TernaryKernels ternary_scalar = table<Scalar>("scalar");

}  // namespace bitnet
