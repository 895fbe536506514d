// Layer and LayerBuffers: one call a layer. Weights are checked once, when the layer is made.
#include "run/layer.h"

#include "bind/cached.h"
#include "bind/rows.h"

namespace bitnet {
namespace {

struct BoundLayer {
  Layer layer;
  py::object weights;  // keeps the arrays and matrices
};

struct BoundBuffers {
  LayerBuffers buffers;
  int64_t normed, wide, codes, rows;  // elements
  py::tuple arrays;
};

Norm norm_from(const py::handle& norm, int64_t width) {
  return norm_of(norm.attr("weight"), norm.attr("bias"), norm.attr("eps").cast<float>(),
                 norm.attr("kind").cast<std::string>(), width);
}

LinearLayer linear_from(const py::handle& linear, int64_t inputs, const char* name) {
  const TernaryMatrix& w = linear.attr("weight").cast<const TernaryMatrix&>();
  if (inputs >= 0 && w.k != inputs)
    raise_shape(std::string(name) + ": found " + shape_of(w.n, w.k) + ", wanted " +
                std::to_string(inputs) + " inputs");
  return {&w, optional_vector<float>(linear.attr("bias"), w.n, "bias"),
          norm_from(linear.attr("norm"), w.k)};
}

std::vector<LinearLayer> group_from(const py::handle& parts, int64_t inputs, const char* name) {
  std::vector<LinearLayer> group;
  for (const py::handle part : parts) group.push_back(linear_from(part, inputs, name));
  if (group.empty()) raise_shape(std::string(name) + ": found no matrices, wanted at least one");
  return group;
}

BoundLayer layer_from(const py::object& weights, const std::string& act, bool gated,
                      float attention_scale) {
  Layer layer{};
  layer.o = linear_from(weights.attr("o"), -1, "o");
  const int64_t hidden = layer.hidden();
  layer.attn_norm = norm_from(weights.attr("attn_norm"), hidden);
  layer.qkv = group_from(weights.attr("qkv"), hidden, "qkv");
  layer.ffn_norm = norm_from(weights.attr("ffn_norm"), hidden);
  layer.gate_up = group_from(weights.attr("gate_up"), hidden, "gate_up");
  const int64_t ffn = layer.ffn_width();
  if (gated && ffn % 2)
    raise_shape("gate_up: found " + std::to_string(ffn) + " outputs, wanted an even number");
  layer.down = linear_from(weights.attr("down"), gated ? ffn / 2 : ffn, "down");
  if (layer.down.weight->n != hidden)
    raise_shape("down: found " + shape_of(layer.down.weight->n, layer.down.weight->k) +
                ", wanted " + std::to_string(hidden) + " outputs");
  layer.act = activation_named(act);
  layer.gated = gated;
  layer.attention_scale = attention_scale;
  return {std::move(layer), weights};
}

BoundBuffers buffers_from(const py::array& normed, const py::array& wide, const py::array& codes,
                          const py::array& scales, const py::array& tops) {
  return {
      {vector_of<float>(normed, -1, "normed", true), vector_of<float>(wide, -1, "wide", true),
       vector_of<int8_t>(codes, -1, "codes", true), vector_of<float>(scales, -1, "scales", true),
       vector_of<int32_t>(tops, scales.size(), "tops", true)},
      normed.size(),
      wide.size(),
      codes.size(),
      scales.size(),
      py::make_tuple(normed, wide, codes, scales, tops)};
}

bool norms_twice(const Norm& norm, const std::vector<LinearLayer>& parts) {
  return norm.kind != NormKind::none && (parts.size() > 1 || parts[0].norm.kind != NormKind::none);
}

void check_buffers(const BoundBuffers& b, const Layer& layer, int64_t rows) {
  const bool normed =
      norms_twice(layer.attn_norm, layer.qkv) || norms_twice(layer.ffn_norm, layer.gate_up);
  if (b.rows < rows || b.wide / layer.wide_floats() < rows || b.codes / layer.code_bytes() < rows ||
      (normed && b.normed / layer.hidden() < rows))
    raise_shape("buffers: found room for fewer rows than hidden's " + std::to_string(rows));
}

void forward(const BoundLayer& self, const py::array& hidden_array, const BoundBuffers& buffers,
             KVCache& cache, int64_t cache_layer, const py::object& cos, const py::object& sin,
             const py::array& seq, const py::array& pos, const py::array& starts,
             const py::array& first_pos, const py::object& kept_rows) {
  const Layer& layer = self.layer;
  const Rows<float> hidden = rows_of<float>(hidden_array, "hidden", true);
  if (hidden.cols != layer.hidden())
    raise_shape("hidden: found " + shape_text(hidden_array) + ", wanted rows of " +
                std::to_string(layer.hidden()));
  check_buffers(buffers, layer, hidden.rows);
  const RopeRows rope = rope_rows_of(cos, sin, cache.shape().dk);
  const Rows<float> qkv = layer_qkv(layer, buffers.buffers, hidden.rows);
  const Claim claim(cache);
  const AppendCall append = append_call(qkv, rope, cache, cache_layer, seq, pos);
  const AttendCall attend =
      attend_call(qkv, cache, cache_layer, starts, first_pos, layer.attention_scale, -1,
                  layer_attention(layer, buffers.buffers, hidden.rows));
  const int32_t* kept = optional_vector<int32_t>(kept_rows, cache.batch(), "kept");
  for (int64_t b = 0; kept != nullptr && b < cache.batch(); ++b)
    bounded(kept[b], 0, attend.starts[b + 1] - attend.starts[b], "kept");
  const py::gil_scoped_release unlocked;
  const FpEnv environment;
  run_layer(layer, buffers.buffers, hidden, append, attend, kept);
}

}  // namespace

void bind_layer(py::module_& m) {
  py::class_<BoundBuffers>(m, "LayerBuffers", "Intermediates that layers write, flat arrays.")
      .def(py::init(&buffers_from), py::arg("normed"), py::arg("wide"), py::arg("codes"),
           py::arg("scales"), py::arg("tops"));
  py::class_<BoundLayer>(m, "Layer", "The weights of one layer, checked.")
      .def(py::init(&layer_from), py::arg("weights"), py::arg("act"), py::arg("gated"),
           py::arg("attention_scale"))
      .def("forward", &forward, py::arg("hidden"), py::arg("buffers"), py::arg("cache"),
           py::arg("cache_layer"), py::arg("cos").none(true), py::arg("sin").none(true),
           py::arg("seq"), py::arg("pos"), py::arg("starts"), py::arg("first_pos"),
           py::arg("kept").none(true) = py::none());
}

}  // namespace bitnet
