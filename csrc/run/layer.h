// One transformer layer over a block of packed rows.
//
//   q, k, v = linear(quantise(attn_norm(h)));  RoPE(q, k);  append k, v;  a = attention(q)
//   h += o(quantise(attn_sub_norm(a)))
//   gate, up = linear(quantise(ffn_norm(h)))
//   h += down(quantise(ffn_sub_norm(act(gate) * up)))
//
// Linear layers are ternary. Those that read the same input stand in one matrix, unless each has a
// norm of its own.
#pragma once
#include <algorithm>
#include <vector>

#include "run/cached.h"
#include "run/run.h"

namespace bitnet {

struct LinearLayer {
  const TernaryMatrix* weight;
  const float* bias;  // [n] or null
  Norm norm;          // inside the layer, of its input
};

struct Layer {
  Norm attn_norm;
  std::vector<LinearLayer> qkv;  // outputs side by side
  LinearLayer o;                 // its norm: the sub-norm
  Norm ffn_norm;
  std::vector<LinearLayer> gate_up;
  LinearLayer down;
  Activation act;
  bool gated;
  float attention_scale;

  int64_t hidden() const { return o.weight->n; }
  int64_t qkv_width() const { return width(qkv); }
  int64_t ffn_width() const { return width(gate_up); }
  static int64_t width(const std::vector<LinearLayer>& parts) {
    int64_t sum = 0;
    for (const LinearLayer& part : parts) sum += part.weight->n;
    return sum;
  }
  // Floats a row of `wide`, bytes a row of `codes`.
  int64_t wide_floats() const { return std::max(qkv_width() + o.weight->k, ffn_width()); }
  int64_t code_bytes() const { return std::max({hidden(), o.weight->k, down.weight->k}); }
};

// Intermediates of M rows.
struct LayerBuffers {
  float* normed;  // [M, E] of a norm that a second norm follows; null when no layer has one
  float* wide;    // [M, q | k | v] then [M, q heads * D], later [M, gate | up] or act(gate) * up
  int8_t* codes;  // [M, widest input]
  float* scales;  // [M]
  int32_t* tops;  // [M] of act(gate) * up, where no norm follows
};

// In place on `hidden` [M, E]. `append` and `attend` say where K and V go and what is attended to;
// their rows are those of layer_qkv and layer_attention. `kept` [batch]: of each sequence only so
// many last rows go on after K and V, and stand at the front of `hidden` in the end; null: all.
void run_layer(const Layer& layer, const LayerBuffers& buffers, Rows<float> hidden,
               const AppendCall& append, AttendCall attend, const int32_t* kept);
Rows<float> layer_qkv(const Layer& layer, const LayerBuffers& buffers, int64_t rows);
Rows<float> layer_attention(const Layer& layer, const LayerBuffers& buffers, int64_t rows);

}  // namespace bitnet
