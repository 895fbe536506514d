#include "run/layer.h"

namespace bitnet {
namespace {

Rows<float> packed(float* data, int64_t rows, int64_t width) { return {data, rows, width, width}; }
RowsIn input(const Rows<float>& x) { return {x.data, x.stride, x.cols}; }

// out (+)= weight . codes
void product(const LinearLayer& linear, const Quantised& codes, const Rows<float>& out,
             bool residual) {
  TernaryProduct p{};
  p.q = codes.q, p.rows = out.rows, p.q_stride = codes.stride;
  p.s = codes.scales, p.bias = linear.bias;
  p.residual = residual;
  p.out = out.data, p.out_stride = out.stride;
  run_ternary(*linear.weight, p);
}

void linear(const LinearLayer& linear, const Norm& norm, const Rows<float>& x,
            const LayerBuffers& buffers, const Rows<float>& out, bool residual) {
  const Quantised codes = {buffers.codes, x.cols, buffers.scales};
  run_norm_quant(input(x), norm, codes, x.rows);
  product(linear, codes, out, residual);
}

// out[:, part] = part(quantise(part.norm(norm(x)))) for the parts side by side.
void group(const std::vector<LinearLayer>& parts, const Norm& norm, Rows<float> x,
           const LayerBuffers& buffers, const Rows<float>& out) {
  if (parts.size() == 1 && parts[0].norm.kind == NormKind::none)
    return linear(parts[0], norm, x, buffers, out, false);
  if (norm.kind != NormKind::none) {
    const Rows<float> normed = packed(buffers.normed, x.rows, x.cols);
    run_norm(x, norm, {}, {normed.data, normed.stride});
    x = normed;
  }
  int64_t column = 0;
  for (const LinearLayer& part : parts) {
    const int64_t width = part.weight->n;
    linear(part, part.norm, x, buffers, {out.data + column, out.rows, width, out.stride}, false);
    column += width;
  }
}

}  // namespace

Rows<float> layer_qkv(const Layer& layer, const LayerBuffers& buffers, int64_t rows) {
  return packed(buffers.wide, rows, layer.qkv_width());
}

Rows<float> layer_attention(const Layer& layer, const LayerBuffers& buffers, int64_t rows) {
  return packed(buffers.wide + rows * layer.qkv_width(), rows, layer.o.weight->k);
}

void run_layer(const Layer& layer, const LayerBuffers& buffers, const Rows<float>& hidden,
               const AppendCall& append, const AttendCall& attend) {
  group(layer.qkv, layer.attn_norm, hidden, buffers, append.qkv);
  run_append(append);
  run_attend(attend);
  linear(layer.o, layer.o.norm, attend.out, buffers, hidden, true);

  const Rows<float> ffn = packed(buffers.wide, hidden.rows, layer.ffn_width());
  group(layer.gate_up, layer.ffn_norm, hidden, buffers, ffn);
  const Quantised codes = {buffers.codes, layer.down.weight->k, buffers.scales};
  run_act_quant(ffn, layer.act, layer.gated, layer.down.norm, codes);
  product(layer.down, codes, hidden, true);
}

}  // namespace bitnet
