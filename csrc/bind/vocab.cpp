// The vocabulary projection, top-k, and the int8 copy of a head.
#include "vocab/vocab.h"

#include "bind/rows.h"
#include "vocab/project.h"

namespace bitnet {
namespace {

constexpr int64_t kQuantiseElements = 65536;  // of the table, a task
constexpr int64_t kSerialProducts = 32768;    // fewer are done before a thread wakes
constexpr int64_t kSumOutputs = 48;           // at most, a task: each reads all of b

// Ascending, so that no two rows of x share one of out.
const int32_t* places_of(const py::object& places, int64_t rows, int64_t most) {
  const int32_t* at = optional_vector<int32_t>(places, rows, "places");
  for (int64_t m = 0; at && m < rows; ++m)
    if (at[m] < (m ? at[m - 1] + 1 : 0) || at[m] >= most)
      raise_shape("places: found " + text(at[m]) + " at " + text(m) + ", wanted 0 to " +
                  text(most - 1) + " ascending");
  return at;
}

void project_all(const py::array& x, const py::array& table, const std::string& dtype,
                 const py::object& scales, const py::object& bias, const py::array& out,
                 const py::object& places) {
  const TableRows t = table_of(table, dtype);
  if ((t.dtype == Dtype::i8) == scales.is_none())
    raise_shape("scales: wanted for an int8 table and for no other");
  Projection p = projection_of(x, t, bias, out, places);
  p.scales = optional_vector<float>(scales, t.rows, "scales");
  const py::gil_scoped_release nogil;
  const VocabKernels& k = *kernels().vocab;
  const MetricsScope metrics("vocab_project", k.isa, t.bytes() + 4 * p.rows * (p.width + t.rows));
  project(k, p, t.rows);
}

void sum_products(const py::array& a, const py::array& b, const py::array& out) {
  const int64_t size = sizeof(float);
  if (!py::isinstance<py::array_t<float>>(a) || a.ndim() != 2 ||
      (a.size() > 0 && (a.strides(0) % size != 0 || a.strides(1) % size != 0)))
    raise_shape("a: found " + shape_text(a) + ", wanted float32 [terms, outputs]");
  const Rows<float> terms = rows_of<float>(b, "b"), sums = rows_of<float>(out, "out", true);
  if (terms.rows != a.shape(0) || sums.rows != a.shape(1) || sums.cols != terms.cols)
    raise_shape("out: found " + shape_text(out) + " for " + shape_text(a) + " and " +
                shape_text(b) + ", wanted [outputs, width]");
  const SumProducts p{static_cast<const float*>(a.data()),
                      a.strides(0) / size,
                      a.strides(1) / size,
                      terms.data,
                      terms.stride,
                      sums.data,
                      sums.stride,
                      terms.rows,
                      terms.cols};
  const py::gil_scoped_release nogil;
  const VocabKernels& k = *kernels().vocab;
  const MetricsScope metrics("sum_products", k.isa,
                             4 * (terms.rows * (sums.rows + terms.cols) + sums.rows * sums.cols));
  const int64_t shared = (sums.rows / (4 * num_threads()) / 6 + 1) * 6;
  const int64_t work = terms.rows * terms.cols, block = std::min(kSumOutputs, shared);
  parallel_rows(sums.rows, work, std::max(kSerialProducts, work * block),
                [&](int64_t begin, int64_t end) { k.sum_products(p, begin, end); });
}

py::tuple topk(const py::array& logits, int64_t k) {
  const Rows<float> in = rows_of<float>(logits, "logits");
  if (k < 1 || k > in.cols)
    raise_shape("k: found " + std::to_string(k) + ", wanted 1 to " + std::to_string(in.cols));
  py::array_t<int32_t> ids({in.rows, k});
  py::array_t<float> values({in.rows, k});
  int32_t* i = ids.mutable_data();
  float* v = values.mutable_data();
  {
    const py::gil_scoped_release nogil;
    const VocabKernels& table = *kernels().vocab;
    const MetricsScope metrics("topk", table.isa, in.rows * (in.cols * 4 + k * 8));
    parallel_rows_scratch(in.rows, 1, k * 8, [&](int64_t row, int64_t, void* scratch) {
      table.topk(in.row(row), in.cols, k, static_cast<uint64_t*>(scratch), i + row * k,
                 v + row * k);
    });
  }
  return py::make_tuple(ids, values);
}

py::tuple quantise_head(const py::array& table, const std::string& dtype) {
  const TableRows t = table_of(table, dtype);
  if (t.dtype == Dtype::i8) raise_shape("dtype: found 'int8', wanted 'f32', 'f16' or 'bf16'");
  py::array_t<int8_t> q = counted_array<int8_t>(t.rows, t.cols);
  py::array_t<float> scales(t.rows);
  int8_t* codes = q.mutable_data();
  float* s = scales.mutable_data();
  {
    const py::gil_scoped_release nogil;
    const VocabKernels& k = *kernels().vocab;
    parallel_rows(t.rows, t.cols, kQuantiseElements, [&](int64_t begin, int64_t end) {
      k.quantise(t.data, t.dtype, t.stride, t.cols, codes, s, begin, end);
    });
  }
  return py::make_tuple(q, scales);
}

}  // namespace

Projection projection_of(const py::array& x, const TableRows& t, const py::object& bias,
                         const py::array& out, const py::object& places) {
  const Rows<float> in = rows_of<float>(x, "x");
  const Rows<float> y = rows_of<float>(out, "out", true);
  if (t.cols != in.cols)
    raise_shape("x: found " + shape_text(x) + ", wanted rows of " + text(t.cols));
  if ((places.is_none() && y.rows != in.rows) || y.cols != t.rows)
    raise_shape("out: found " + shape_text(out) + ", wanted " + shape_of(in.rows, t.rows));
  return {in.data,
          in.stride,
          t.data,
          t.stride,
          t.dtype,
          nullptr,
          optional_vector<float>(bias, t.rows, "bias"),
          y.data,
          y.stride,
          in.rows,
          in.cols,
          places_of(places, in.rows, y.rows)};
}

void bind_vocab(py::module_& m) {
  m.def("project", &project_all, py::arg("x"), py::arg("table"), py::arg("dtype"),
        py::arg("scales"), py::arg("bias"), py::arg("out"), py::arg("places") = py::none());
  m.def("sum_products", &sum_products, py::arg("a"), py::arg("b"), py::arg("out"));
  m.def("topk", &topk, py::arg("logits"), py::arg("k"));
  m.def("quantise_head", &quantise_head, py::arg("table"), py::arg("dtype"));
}

}  // namespace bitnet
