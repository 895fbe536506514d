// Operations on the rows of a matrix: norms, int8 quantisation, activations, embeddings, softmax.
// Each kernel works on rows [begin, end); a row's bits depend on nothing but the row.
#pragma once
#include "base/types.h"

namespace bitnet {

enum class NormKind : int32_t { none, rms, layer };
enum class Activation : int32_t { relu2, silu, gelu, gelu_tanh };
enum class Unary : int32_t { exp, log, tanh, erf, relu2, silu, gelu, gelu_tanh, f16 };

struct Norm {
  NormKind kind;
  float eps;
  const float* weight;  // [width], null: ones
  const float* bias;    // [width], null: zeros
};

// Statistics of each row, [rows] each; null: not wanted. mean is 0 for rms.
struct NormStats {
  float *mean, *inv_std;
};

struct RowsIn {
  const float* data;
  int64_t stride;  // elements from one row to the next
  int64_t width;
};
struct RowsOut {
  float* data;
  int64_t stride;
};
// q = clamp(rint(y * s), -128, 127), s = 127 / max(absmax(y), 1e-5).  The absmax of a row is held
// as the bits of that float, its top: as integers, absolute values keep their order, and NaN stands
// above infinity.
struct Quantised {
  int8_t* q;
  int64_t stride;
  float* scales;  // [rows]
};

// Heads of `size` elements; the first 2 * half of each are turned, the rest copied.
struct Rotary {
  const float* x;  // [batch, heads, tokens, size] at these strides, in elements
  int64_t x_batch, x_head, x_token;
  float* y;
  int64_t y_batch, y_head, y_token;
  const float *cos, *sin;  // [positions, half]
  const int64_t* ids;      // [batch * tokens] rows of cos and sin; null: token i has row i
  int64_t heads, tokens, size, half;
  bool interleaved;
};

struct RowwiseKernels {
  const char* isa;
  void (*norm)(const RowsIn& x, const Norm& norm, const NormStats& stats, const RowsOut& y,
               int64_t begin, int64_t end);
  void (*norm_quant)(const RowsIn& x, const Norm& norm, const Quantised& q, int64_t begin,
                     int64_t end);
  // The same without a norm, of rows whose largest elements are known: tops [rows].
  void (*quantise)(const RowsIn& x, const int32_t* tops, const Quantised& q, int64_t begin,
                   int64_t end);
  // Gradients of `norm` (rms or layer; its bias is not read): dx, and dweight and dbias [width]
  // summed over these rows alone, in ascending order; null: not wanted.
  void (*norm_backward)(const RowsIn& x, const Norm& norm, const RowsIn& dy, const RowsOut& dx,
                        float* dweight, float* dbias, int64_t begin, int64_t end);
  // y = act(x[:, :width]) or, gated, act(x[:, :width]) * x[:, width:]; tops [rows] of y; null: not
  // wanted.
  void (*activate)(const RowsIn& x, Activation act, bool gated, const RowsOut& y, int32_t* tops,
                   int64_t begin, int64_t end);
  // Quantises norm(act(x[:, :width])) or, gated, norm(act(x[:, :width]) * x[:, width:]);
  // scratch: float [width].
  void (*act_quant)(const RowsIn& x, Activation act, bool gated, const Norm& norm,
                    const Quantised& q, float* scratch, int64_t begin, int64_t end);
  // y[i] = table[ids[i]], ids in range.
  void (*embed)(const void* table, Dtype dtype, int64_t stride, const int32_t* ids,
                const RowsOut& y, int64_t width, int64_t begin, int64_t end);
  // x[i] += table[ids[i]]
  void (*add_rows)(const RowsIn& table, const int32_t* ids, const RowsOut& x, int64_t begin,
                   int64_t end);
  // Turns tokens begin..end-1 of batch * tokens.
  void (*rotary)(const Rotary& r, int64_t begin, int64_t end);
  void (*log_softmax)(const RowsIn& x, const RowsOut& y, int64_t begin, int64_t end);
  // y[i] = log_softmax(x[i])[targets[i]]; greedy[i]: no other id has more, nor the same if lower.
  void (*log_softmax_gather)(const RowsIn& x, const int32_t* targets, float* y, bool* greedy,
                             int64_t begin, int64_t end);
  void (*unary)(Unary op, const float* x, float* y, int64_t n);
};

extern const RowwiseKernels rowwise_scalar;
extern const RowwiseKernels rowwise_avx2;
extern const RowwiseKernels rowwise_avx512;

// cos and sin of float32(position) * inv_freq[i], that product rounded to float32, for positions
// [begin, end) into rows of `half` floats. Errors below 0.51 units in the last place for angles
// below kMaxRopeAngle.
constexpr float kMaxRopeAngle = 0x1p20f;
void rope_table(const float* inv_freq, int64_t half, float* cos, float* sin, int64_t begin,
                int64_t end);

}  // namespace bitnet
