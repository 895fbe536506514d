#include "run/layer.h"

#include <cstring>

namespace bitnet {
namespace {

Rows<float> packed(float* data, int64_t rows, int64_t width) { return {data, rows, width, width}; }
RowsIn input(const Rows<float>& x) { return {x.data, x.stride, x.cols}; }

// out (+)= weight . codes
TernaryProduct product(const LinearLayer& linear, const Quantised& codes, const Rows<float>& out,
                       bool residual) {
  TernaryProduct p{};
  p.q = codes.q, p.rows = out.rows, p.q_stride = codes.stride;
  p.s = codes.scales, p.bias = linear.bias;
  p.residual = residual;
  p.out = out.data, p.out_stride = out.stride;
  return p;
}

void linear(const LinearLayer& linear, const Norm& norm, const Rows<float>& x,
            const LayerBuffers& buffers, const Rows<float>& out, bool residual) {
  const Quantised codes = {buffers.codes, x.cols, buffers.scales};
  run_norm_quant(input(x), norm, codes, x.rows);
  run_ternary(*linear.weight, product(linear, codes, out, residual));
}

// Whether they are one product.
bool single(const std::vector<LinearLayer>& parts) {
  return parts.size() == 1 && parts[0].norm.kind == NormKind::none;
}

// out[:, part] = part(quantise(part.norm(norm(x)))) for the parts side by side.
void group(const std::vector<LinearLayer>& parts, const Norm& norm, Rows<float> x,
           const LayerBuffers& buffers, const Rows<float>& out) {
  if (single(parts)) return linear(parts[0], norm, x, buffers, out, false);
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

// codes = quantise(norm of down(act(gate) * up))
void activate(const Layer& layer, const LayerBuffers& buffers, const Rows<float>& hidden,
              const Quantised& codes) {
  const LinearLayer& first = layer.gate_up[0];
  if (!single(layer.gate_up) || !runs_activation(*first.weight, hidden.rows, layer.gated)) {
    const Rows<float> ffn = packed(buffers.wide, hidden.rows, layer.ffn_width());
    group(layer.gate_up, layer.ffn_norm, hidden, buffers, ffn);
    return run_act_quant(ffn, layer.act, layer.gated, layer.down.norm, codes);
  }
  const Quantised in = {buffers.codes, hidden.cols, buffers.scales};
  run_norm_quant(input(hidden), layer.ffn_norm, in, hidden.rows);
  const Rows<float> ffn = packed(buffers.wide, hidden.rows, layer.down.weight->k);
  const bool plain = layer.down.norm.kind == NormKind::none;
  run_ternary_activated(*first.weight, product(first, in, ffn, false),
                        {layer.act, layer.gated, plain ? buffers.tops : nullptr});
  if (plain) return run_quantise(input(ffn), buffers.tops, codes, ffn.rows);
  run_norm_quant(input(ffn), layer.down.norm, codes, ffn.rows);
}

// The geometry of the last kept[b] rows of each sequence.
struct Kept {
  std::vector<int32_t> starts, first_pos;
};

// Moves those rows of the queries and of `hidden` to the front.
Kept move_kept(const AttendCall& a, const int32_t* kept, const Rows<float>& hidden) {
  const int64_t batch = a.cache->batch();
  const size_t queries = sizeof(float) * size_t(a.heads.q) * size_t(a.cache->shape().dk);
  Kept result;
  int32_t to = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t end = a.starts[b + 1], first = end - kept[b];
    result.starts.push_back(to);
    result.first_pos.push_back(a.first_pos[b] + first - a.starts[b]);
    for (int32_t from = first; from < end; ++from, ++to) {
      std::memmove(a.qkv.row(to), a.qkv.row(from), queries);
      std::memmove(hidden.row(to), hidden.row(from), sizeof(float) * size_t(hidden.cols));
    }
  }
  result.starts.push_back(to);
  return result;
}

}  // namespace

Rows<float> layer_qkv(const Layer& layer, const LayerBuffers& buffers, int64_t rows) {
  return packed(buffers.wide, rows, layer.qkv_width());
}

Rows<float> layer_attention(const Layer& layer, const LayerBuffers& buffers, int64_t rows) {
  return packed(buffers.wide + rows * layer.qkv_width(), rows, layer.o.weight->k);
}

void run_layer(const Layer& layer, const LayerBuffers& buffers, Rows<float> hidden,
               const AppendCall& append, AttendCall attend, const int32_t* kept) {
  group(layer.qkv, layer.attn_norm, hidden, buffers, append.qkv);
  run_append(append);
  Kept moved;
  if (kept != nullptr) {
    moved = move_kept(attend, kept, hidden);
    attend.starts = moved.starts.data(), attend.first_pos = moved.first_pos.data();
    hidden.rows = attend.qkv.rows = moved.starts.back();
    attend.out = layer_attention(layer, buffers, hidden.rows);
    if (hidden.rows == 0) return;
  }
  run_attend(attend);
  linear(layer.o, layer.o.norm, attend.out, buffers, hidden, true);

  const Quantised codes = {buffers.codes, layer.down.weight->k, buffers.scales};
  activate(layer, buffers, hidden, codes);
  run_ternary(*layer.down.weight, product(layer.down, codes, hidden, true));
}

}  // namespace bitnet
