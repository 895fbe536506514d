#include <pybind11/stl.h>

#include <cmath>
#include <memory>

#include "bind/bind.h"
#include "run/run.h"
#include "ternary/pack.h"

namespace bitnet {
namespace {

struct KindRow {
  const char* name;
  SourceKind kind;
  char dtype;  // NumPy kind
  int size;    // bytes of an element
};
constexpr KindRow kKinds[] = {
    {"codes", SourceKind::codes, 'i', 1},
    {"hf", SourceKind::hf, 'u', 1},
    {"tq1_0", SourceKind::tq1_0, 'u', 1},
    {"tq2_0", SourceKind::tq2_0, 'u', 1},
    {"i2_s", SourceKind::i2_s, 'u', 1},
    {"i2_s_arm", SourceKind::i2_s_arm, 'u', 1},
    {"i2_s_rows4", SourceKind::i2_s_rows4, 'u', 1},
    {"f32", SourceKind::f32, 'f', 4},
    {"f16", SourceKind::f16, 'u', 2},
    {"bf16", SourceKind::bf16, 'u', 2},
};

const KindRow& kind_named(const std::string& name) {
  for (const KindRow& row : kKinds)
    if (name == row.name) return row;
  throw PackError("kind: found '" + name + "', wanted one of codes, hf, tq1_0, ...");
}

int32_t quads_of(const std::string& bits) {
  if (bits == "2") return 4;
  if (bits == "1.6") return 5;
  raise_shape("bits: found '" + bits + "', wanted '2' or '1.6'");
}

int32_t preferred(int64_t k) { return preferred_quads(*kernels().ternary, k); }

using SourceTuple =
    std::tuple<std::string, std::string, py::array, int64_t, int64_t, double, bool, py::object>;

TernarySource view_of(const SourceTuple& t) {
  const auto& [name, kind_name, data, n, k, scale, divide, row_order] = t;
  const KindRow& kind = kind_named(kind_name);
  TernarySource source{name,   kind.kind, static_cast<const uint8_t*>(data.data()),
                       n,      k,         float(scale),
                       divide, nullptr};
  if (n < 0 || k < 0 || (k > 0 && n > INT64_MAX / 8 / k))
    throw PackError(name + ": found a matrix of " + std::to_string(n) + " x " + std::to_string(k));
  const int64_t wanted = source_bytes(source);
  if (data.dtype().kind() != kind.dtype || data.itemsize() != kind.size ||
      int64_t(data.nbytes()) != wanted || !(data.flags() & py::array::c_style))
    throw PackError(name + ": found data of " + shape_text(data) + ", wanted " +
                    std::to_string(wanted) + " contiguous bytes of " + kind_name);
  source.row_order = optional_vector<int32_t>(row_order, n, "row_order");
  return source;
}

std::unique_ptr<TernaryMatrix> packed(const std::vector<TernarySource>& sources, int32_t quads) {
  py::gil_scoped_release release;
  FpEnv environment;
  return std::make_unique<TernaryMatrix>(ternary_pack(sources, quads));
}

std::unique_ptr<TernaryMatrix> from_sources(const std::vector<SourceTuple>& tuples,
                                            const std::string& bits) {
  try {
    if (tuples.empty()) throw PackError("sources: found none, wanted at least one matrix");
    std::vector<TernarySource> sources;
    for (const SourceTuple& t : tuples) sources.push_back(view_of(t));
    return packed(sources, bits == "auto" ? preferred(sources[0].k) : quads_of(bits));
  } catch (const PackError& error) {
    raise_error("CheckpointError", error.what());
  }
}

std::unique_ptr<TernaryMatrix> pack(const py::object& matrix, const py::object& scale,
                                    const std::string& bits) {
  const int32_t quads = quads_of(bits);
  const py::array any = py::array::ensure(matrix);
  if (!any || !py::isinstance<py::array_t<int8_t>>(any) || any.ndim() != 2)
    raise_shape("matrix: found " + (any ? shape_text(any) : std::string("no array")) +
                ", wanted int8 [N, K] of -1, 0 and 1");
  const auto codes = py::array_t<int8_t, py::array::c_style>::ensure(any);
  const auto scales = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(scale);
  const int64_t n = codes.shape(0), count = scales ? scales.size() : 0;
  if (!scales || scales.ndim() > 1 || (scales.ndim() == 1 && count != n))
    raise_shape("scale: found " + (scales ? shape_text(scales) : std::string("no numbers")) +
                ", wanted a number or [" + std::to_string(n) + "]");
  for (int64_t i = 0; i < count; ++i)
    if (const float s = scales.data()[i]; !(s > 0 && std::isfinite(s)))
      raise_shape("scale: found " + std::to_string(s) + ", wanted positive finite numbers");
  const auto* data = reinterpret_cast<const uint8_t*>(codes.data());
  try {
    auto w =
        packed({{"matrix", SourceKind::codes, data, n, codes.shape(1), 1, false, nullptr}}, quads);
    w->set_scales(scales.data(), scales.ndim() == 1);
    return w;
  } catch (const PackError& error) {
    raise_shape(error.what());
  }
}

py::object scale_of(const TernaryMatrix& w) {
  if (w.uniform_scale && w.n > 0) return py::float_(w.scales()[0]);
  py::array_t<float> scale(w.n);
  std::copy(w.scales(), w.scales() + w.n, scale.mutable_data());
  return scale;
}

py::array_t<int8_t> unpack(const TernaryMatrix& w) {
  py::array_t<int8_t> out({w.n, w.k});
  int8_t* data = out.mutable_data();
  py::gil_scoped_release release;
  ternary_unpack(w, data);
  return out;
}

void check_sizes(const Rows<int8_t>& q, const TernaryMatrix& w, int64_t rows, int64_t cols) {
  if (q.cols != w.k)
    raise_shape("q: found " + std::to_string(q.cols) + " columns, wanted " + std::to_string(w.k));
  if (rows != q.rows || cols != w.n)
    raise_shape("out: found [" + std::to_string(rows) + ", " + std::to_string(cols) +
                "], wanted [" + std::to_string(q.rows) + ", " + std::to_string(w.n) + "]");
}

void matmul(const py::array& q_array, const TernaryMatrix& w, const py::array& out_array) {
  const auto q = rows_of<int8_t>(q_array, "q");
  const auto out = rows_of<int32_t>(out_array, "out", true);
  check_sizes(q, w, out.rows, out.cols);
  TernaryProduct p{};
  p.q = q.data, p.rows = q.rows, p.q_stride = q.stride;
  p.acc = out.data, p.out_stride = out.stride;
  const py::gil_scoped_release release;
  run_ternary(w, p);
}

void linear(const py::array& q_array, const py::array& s, const TernaryMatrix& w,
            const py::object& bias, bool residual, const py::array& out_array) {
  const auto q = rows_of<int8_t>(q_array, "q");
  const auto out = rows_of<float>(out_array, "out", true);
  check_sizes(q, w, out.rows, out.cols);
  TernaryProduct p{};
  p.q = q.data, p.rows = q.rows, p.q_stride = q.stride;
  p.s = vector_of<float>(s, q.rows, "s");
  p.bias = optional_vector<float>(bias, w.n, "bias");
  p.residual = residual;
  p.out = out.data, p.out_stride = out.stride;
  const py::gil_scoped_release release;
  run_ternary(w, p);
}

constexpr const char* kClassDoc =
    "A ternary matrix [N, K] in panels for the kernels, with its scale; immutable.";
constexpr const char* kPackDoc =
    R"(Pack a matrix of -1, 0 and 1 for ternary_matmul and ternary_linear.

matrix: int8 [N, K].  scale: a positive number or float32 [N]; the product is multiplied by it.
bits: "2" (4 weights a byte) or "1.6" (5 weights a byte: less memory traffic, a little more
arithmetic); the results are the same.

Raises:
    InvalidShapeError: another dtype or rank, a value other than -1, 0 and 1, or a bad scale.
)";

}  // namespace

void bind_ternary(py::module_& m) {
  py::class_<TernaryMatrix>(m, "PackedTernary", kClassDoc)
      .def_static("pack", &pack, py::arg("matrix"), py::arg("scale"), py::arg("bits") = "2",
                  kPackDoc)
      .def_static("from_sources", &from_sources, py::arg("sources"), py::arg("bits"))
      .def_static(
          "stored_bytes", [](int64_t n, int64_t k) { return ternary_bytes(n, k, preferred(k)); },
          py::arg("n"), py::arg("k"))
      .def_property_readonly(
          "shape", [](const TernaryMatrix& w) { return py::make_tuple(w.n, w.k); }, "(N, K)")
      .def_property_readonly("scale", &scale_of, "float, or float32 [N] where rows differ")
      .def_readonly("divide", &TernaryMatrix::divide,
                    "whether y = acc / (scale * s) instead of (acc / s) * scale")
      .def_property_readonly(
          "bits", [](const TernaryMatrix& w) { return w.quads == 4 ? "2" : "1.6"; },
          "bits a stored weight: \"2\" or \"1.6\"")
      .def_property_readonly(
          "nbytes",
          [](const TernaryMatrix& w) { return w.panel_bytes() + w.n * int64_t(sizeof(float)); },
          "bytes of the stored weights and scales")
      .def("unpack", &unpack, "The weights as int8 [N, K] of -1, 0 and 1.");
  m.def("ternary_matmul", &matmul, py::arg("q"), py::arg("weight"), py::arg("out"));
  m.def("ternary_linear", &linear, py::arg("q"), py::arg("s"), py::arg("weight"), py::arg("bias"),
        py::arg("residual"), py::arg("out"));
}

}  // namespace bitnet
