// Activations, embeddings, log-softmax, rotary tables and rotation.
#include "rowwise/rowwise.h"

#include <cmath>

#include "bind/rows.h"

namespace bitnet {
namespace {

const std::pair<const char*, Activation> kActivations[] = {{"relu2", Activation::relu2},
                                                           {"silu", Activation::silu},
                                                           {"gelu", Activation::gelu},
                                                           {"gelu_tanh", Activation::gelu_tanh}};
const std::pair<const char*, Unary> kUnaries[] = {
    {"exp", Unary::exp},     {"log", Unary::log},
    {"tanh", Unary::tanh},   {"erf", Unary::erf},
    {"relu2", Unary::relu2}, {"silu", Unary::silu},
    {"gelu", Unary::gelu},   {"gelu_tanh", Unary::gelu_tanh},
    {"f16", Unary::f16}};

template <class T, size_t N>
T named(const std::pair<const char*, T> (&names)[N], const std::string& name, const char* what) {
  std::string wanted;
  for (const auto& [text, value] : names) {
    if (name == text) return value;
    wanted.append(wanted.empty() ? "" : ", ").append(text);
  }
  raise_shape(std::string(what) + ": found '" + name + "', wanted one of " + wanted);
}

const int32_t* checked_ids(const py::array& ids, int64_t size, int64_t limit, const char* name) {
  const int32_t* p = vector_of<int32_t>(ids, size, name);
  for (int64_t i = 0; i < size; ++i)
    if (p[i] < 0 || p[i] >= limit)
      raise_shape(std::string(name) + ": found " + std::to_string(p[i]) + " at " +
                  std::to_string(i) + ", wanted 0 to " + std::to_string(limit - 1));
  return p;
}

void act_quant(const py::array& x, const std::string& act, bool gated, const py::object& weight,
               const py::object& bias, const std::string& kind, float eps, const py::array& q,
               const py::array& scales) {
  const Rows<float> in = rows_of<float>(x, "x");
  if (gated && in.cols % 2)
    raise_shape("x: found " + shape_text(x) + ", wanted an even width: gate and up side by side");
  const int64_t width = gated ? in.cols / 2 : in.cols;
  const Activation function = activation_named(act);
  const Norm spec = norm_of(weight, bias, eps, kind, width);
  const Rows<int8_t> codes = exact_rows<int8_t>(q, in.rows, width, "q", true);
  const Quantised out{codes.data, codes.stride, vector_of<float>(scales, in.rows, "s", true)};
  const py::gil_scoped_release nogil;
  run_act_quant(in, function, gated, spec, out);
}

void embed(const py::array& table, const std::string& dtype, const py::array& ids,
           const py::array& out) {
  const TableRows t = table_of(table, dtype);
  const Rows<float> y = rows_of<float>(out, "out", true);
  if (y.cols != t.cols)
    raise_shape("out: found " + shape_text(out) + ", wanted rows of " + std::to_string(t.cols));
  const int32_t* rows = checked_ids(ids, y.rows, t.rows, "ids");
  const py::gil_scoped_release nogil;
  const RowwiseKernels& k = *kernels().rowwise;
  const MetricsScope metrics("embed", k.isa, y.rows * y.cols * (4 + t.element_bytes()));
  const RowsOut result{y.data, y.stride};
  parallel_rows(y.rows, y.cols, kTaskElements, [&](int64_t begin, int64_t end) {
    k.embed(t.data, t.dtype, t.stride, rows, result, t.cols, begin, end);
  });
}

void add_rows(const py::array& x, const py::array& table, const py::array& ids) {
  const Rows<float> y = rows_of<float>(x, "x", true);
  const Rows<float> t = rows_of<float>(table, "table");
  if (t.cols != y.cols)
    raise_shape("table: found " + shape_text(table) + ", wanted rows of " + std::to_string(y.cols));
  const int32_t* rows = checked_ids(ids, y.rows, t.rows, "pos");
  const py::gil_scoped_release nogil;
  const RowwiseKernels& k = *kernels().rowwise;
  const MetricsScope metrics("add_rows", k.isa, y.rows * y.cols * 12);
  const RowsIn source{t.data, t.stride, t.cols};
  const RowsOut result{y.data, y.stride};
  parallel_rows(y.rows, y.cols, kTaskElements,
                [&](int64_t begin, int64_t end) { k.add_rows(source, rows, result, begin, end); });
}

Rows<float> logits_of(const py::array& logits) {
  const Rows<float> in = rows_of<float>(logits, "logits");
  if (in.cols == 0) raise_shape("logits: found " + shape_text(logits) + ", wanted V > 0");
  return in;
}

py::array log_softmax(const py::array& logits) {
  const Rows<float> in = logits_of(logits);
  py::array_t<float> out = counted_array<float>(in.rows, in.cols);
  const RowsOut result{out.mutable_data(), in.cols};
  const py::gil_scoped_release nogil;
  const RowwiseKernels& k = *kernels().rowwise;
  const MetricsScope metrics("log_softmax", k.isa, in.rows * in.cols * 8);
  const RowsIn rows{in.data, in.stride, in.cols};
  parallel_rows(in.rows, in.cols, kTaskElements,
                [&](int64_t begin, int64_t end) { k.log_softmax(rows, result, begin, end); });
  return out;
}

py::tuple log_softmax_gather(const py::array& logits, const py::array& targets) {
  const Rows<float> in = logits_of(logits);
  const int32_t* ids = checked_ids(targets, in.rows, in.cols, "targets");
  py::array_t<float> logprobs(in.rows);
  py::array_t<bool> greedy(in.rows);
  float* y = logprobs.mutable_data();
  bool* best = greedy.mutable_data();
  {
    const py::gil_scoped_release nogil;
    const RowwiseKernels& k = *kernels().rowwise;
    const MetricsScope metrics("log_softmax", k.isa, in.rows * in.cols * 4);
    const RowsIn rows{in.data, in.stride, in.cols};
    parallel_rows(in.rows, in.cols, kTaskElements, [&](int64_t begin, int64_t end) {
      k.log_softmax_gather(rows, ids, y, best, begin, end);
    });
  }
  return py::make_tuple(logprobs, greedy);
}

py::tuple rope_tables(const py::array& inv_freq, int64_t positions) {
  const float* freq = vector_of<float>(inv_freq, -1, "inv_freq");
  const int64_t half = inv_freq.shape(0);
  if (positions < 0) raise_shape("positions: found a negative number");
  for (int64_t i = 0; i < half; ++i)
    if (!(std::fabs(freq[i]) * float(positions) <= kMaxRopeAngle))
      raise_shape("inv_freq: found " + std::to_string(freq[i]) + " at " + std::to_string(i) +
                  ", wanted angles up to 2^20 within " + std::to_string(positions) + " positions");
  py::array_t<float> cos = counted_array<float>(positions, half);
  py::array_t<float> sin = counted_array<float>(positions, half);
  float *c = cos.mutable_data(), *s = sin.mutable_data();
  {
    const py::gil_scoped_release nogil;
    const FpEnv environment;
    parallel_rows(positions, half, kTaskElements / 4,
                  [&](int64_t begin, int64_t end) { rope_table(freq, half, c, s, begin, end); });
  }
  return py::make_tuple(cos, sin);
}

// A float32 view [batch, heads, tokens, size] with contiguous heads; strides in elements.
struct Heads {
  float* data;
  int64_t batch, head, token;
};
Heads heads_of(const py::array& a, const char* name, bool writable) {
  if (!py::isinstance<py::array_t<float>>(a) || a.ndim() != 4)
    raise_shape(std::string(name) + ": found " + shape_text(a) + ", wanted a 4-D float32 array");
  if (a.size() > 0 && a.shape(3) > 1 && a.strides(3) != 4)
    raise_shape(std::string(name) + ": heads must be contiguous, found strides of " +
                shape_text(a));
  if (writable && !a.writeable()) raise_shape(std::string(name) + ": the array is read-only");
  return {const_cast<float*>(static_cast<const float*>(a.data())), a.strides(0) / 4,
          a.strides(1) / 4, a.strides(2) / 4};
}

void rotary(const py::array& x, const py::array& cos, const py::array& sin, const py::object& ids,
            bool interleaved, const py::array& out) {
  const Heads in = heads_of(x, "x", false), y = heads_of(out, "out", true);
  for (int i = 0; i < 4; ++i)
    if (x.shape(i) != out.shape(i))
      raise_shape("out: found " + shape_text(out) + ", wanted the shape of x, " + shape_text(x));
  const int64_t tokens = x.shape(0) * x.shape(2);
  const Rows<float> angles = rows_of<float>(cos, "cos");
  if (2 * angles.cols > x.shape(3))
    raise_shape("cos: found " + shape_text(cos) + ", wanted at most half of heads of " +
                std::to_string(x.shape(3)));
  if (ids.is_none() && angles.rows != tokens)
    raise_shape("cos: found " + shape_text(cos) + ", wanted " + std::to_string(tokens) + " rows");
  const Rows<float> sines = exact_rows<float>(sin, angles.rows, angles.cols, "sin");
  if (std::max(angles.stride, sines.stride) > angles.cols && angles.rows > 1 && angles.cols > 0)
    raise_shape("cos, sin: wanted contiguous tables");
  const int64_t* rows = optional_vector<int64_t>(ids, tokens, "position_ids");
  if (rows)
    for (int64_t i = 0; i < tokens; ++i)
      if (rows[i] < 0 || rows[i] >= angles.rows)
        raise_shape("position_ids: found " + std::to_string(rows[i]) + ", wanted 0 to " +
                    std::to_string(angles.rows - 1));
  const Rotary task = {in.data,    in.batch,   in.head,     in.token,   y.data, y.batch,
                       y.head,     y.token,    angles.data, sines.data, rows,   x.shape(1),
                       x.shape(2), x.shape(3), angles.cols, interleaved};
  const py::gil_scoped_release nogil;
  const RowwiseKernels& k = *kernels().rowwise;
  const int64_t width = task.heads * task.size;
  const MetricsScope metrics("rotary", k.isa, tokens * width * 8);
  parallel_rows(tokens, width, kTaskElements,
                [&](int64_t begin, int64_t end) { k.rotary(task, begin, end); });
}

void elementwise(const std::string& op, const py::array& x, const py::array& out) {
  const Unary function = named(kUnaries, op, "op");
  const int64_t n = x.ndim() == 1 ? x.shape(0) : -1;
  const float* in = vector_of<float>(x, n, "x");
  float* y = vector_of<float>(out, n, "out", true);
  const py::gil_scoped_release nogil;
  const FpEnv environment;
  kernels().rowwise->unary(function, in, y, n);
}

}  // namespace

Activation activation_named(const std::string& name) { return named(kActivations, name, "act"); }

TableRows table_of(const py::array& table, const std::string& dtype) {
  const auto take = [&](const auto& rows, Dtype kind) {
    return TableRows{rows.data, kind, rows.rows, rows.cols, rows.stride};
  };
  if (dtype == "f32") return take(rows_of<float>(table, "table"), Dtype::f32);
  if (dtype == "f16") return take(rows_of<uint16_t>(table, "table"), Dtype::f16);
  if (dtype == "bf16") return take(rows_of<uint16_t>(table, "table"), Dtype::bf16);
  if (dtype == "int8") return take(rows_of<int8_t>(table, "table"), Dtype::i8);
  raise_shape("dtype: found '" + dtype + "', wanted 'f32', 'f16', 'bf16' or 'int8'");
}

void bind_rowwise(py::module_& m) {
  m.def("act_quant", &act_quant, py::arg("x"), py::arg("act"), py::arg("gated"), py::arg("norm_w"),
        py::arg("norm_b"), py::arg("kind"), py::arg("eps"), py::arg("q"), py::arg("s"));
  m.def("embed", &embed, py::arg("table"), py::arg("dtype"), py::arg("ids"), py::arg("out"));
  m.def("add_rows", &add_rows, py::arg("x"), py::arg("table"), py::arg("pos"));
  m.def("log_softmax", &log_softmax, py::arg("logits"));
  m.def("log_softmax_gather", &log_softmax_gather, py::arg("logits"), py::arg("targets"));
  m.def("rope_table", &rope_tables, py::arg("inv_freq"), py::arg("positions"));
  m.def("rotary", &rotary, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("position_ids"),
        py::arg("interleaved"), py::arg("out"));
  m.def("elementwise", &elementwise, py::arg("op"), py::arg("x"), py::arg("out"));
}

}  // namespace bitnet
