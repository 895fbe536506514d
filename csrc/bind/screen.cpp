// The screen of a vocabulary table, and projections through it.
#include <pybind11/stl.h>

#include <vector>

#include "bind/rows.h"
#include "screen/select.h"

namespace bitnet {
namespace {

std::unique_ptr<Screen> make_screen(const py::array& table, const std::string& dtype) {
  const TableRows t = table_of(table, dtype);
  if (t.dtype == Dtype::i8) raise_shape("dtype: found 'int8', wanted 'f32', 'f16' or 'bf16'");
  if (t.cols < 1 || t.cols > kScreenWidth)
    raise_shape("table: found " + shape_text(table) + ", wanted rows of 1 to " +
                text(kScreenWidth));
  const py::gil_scoped_release nogil;
  const ScreenKernels& k = *kernels().screen;
  const MetricsScope metrics("screen_pack", k.isa, t.bytes() + Screen::bytes(t.rows, t.cols));
  return std::make_unique<Screen>(k, t.data, t.dtype, t.stride, t.rows, t.cols);
}

// The ids to keep of all rows, one after the other, and where each row's begin.
struct Kept {
  std::vector<int32_t> ids;
  std::vector<int64_t> starts = {0};
};

Kept kept_of(const std::vector<py::array>& keep, int64_t rows, int64_t vocab) {
  if (int64_t(keep.size()) != rows)
    raise_shape("keep: found " + text(int64_t(keep.size())) + " arrays, wanted " + text(rows));
  Kept kept;
  for (const py::array& part : keep) {
    const int32_t* ids = vector_of<int32_t>(part, -1, "keep");
    for (py::ssize_t i = 0; i < part.shape(0); ++i) {
      if (ids[i] < 0 || ids[i] >= vocab)
        raise_shape("keep: found id " + text(ids[i]) + ", wanted 0 to " + text(vocab - 1));
      kept.ids.push_back(ids[i]);
    }
    kept.starts.push_back(int64_t(kept.ids.size()));
  }
  return kept;
}

void project_top_rows(const py::array& x, const py::array& table, const std::string& dtype,
                      const py::object& bias, const Screen& screen, int64_t k,
                      const std::vector<py::array>& keep, const py::array& out,
                      const py::object& places) {
  const TableRows t = table_of(table, dtype);
  if (t.rows != screen.rows() || t.cols != screen.table().width || t.dtype == Dtype::i8)
    raise_shape("table: found " + dtype + " " + shape_text(table) + ", wanted the screen's own, [" +
                text(screen.rows()) + ", " + text(screen.table().width) + "]");
  if (!screen.finite()) raise_shape("screen: found values that are not finite, wanted finite ones");
  const Projection p = projection_of(x, t, bias, out, places);
  if (k < 1 || k > t.rows) raise_shape("k: found " + text(k) + ", wanted 1 to " + text(t.rows));
  const Kept kept = kept_of(keep, p.rows, t.rows);
  const py::gil_scoped_release nogil;
  const Kernels& all = kernels();
  MetricsScope metrics("vocab_screen", all.screen->isa, 4 * p.rows * (p.width + t.rows));
  metrics.add_bytes(
      project_top(*all.vocab, *all.screen, screen, p, k, kept.ids.data(), kept.starts.data()));
}

py::object bounds(const Screen& screen, const py::array& x, const py::object& bias) {
  const float* row = vector_of<float>(x, screen.table().width, "x");
  const float* b = optional_vector<float>(bias, screen.rows(), "bias");
  py::array_t<float> out({int64_t(kPlanes), int64_t(2), screen.rows()});
  const FpEnv environment;
  const bool known = screen_bounds(*kernels().screen, screen, row, b, out.mutable_data());
  return known ? py::object(out) : py::none();
}

}  // namespace

void bind_screen(py::module_& m) {
  py::class_<Screen>(m, "VocabScreen")
      .def(py::init(&make_screen), py::arg("table"), py::arg("dtype"))
      .def_static("bytes", &Screen::bytes, py::arg("rows"), py::arg("width"))
      .def_property_readonly("nbytes", &Screen::nbytes)
      .def_property_readonly("finite", &Screen::finite)
      .def("bounds", &bounds, py::arg("x"), py::arg("bias"));
  m.def("project_top", &project_top_rows, py::arg("x"), py::arg("table"), py::arg("dtype"),
        py::arg("bias"), py::arg("screen"), py::arg("k"), py::arg("keep"), py::arg("out"),
        py::arg("places") = py::none());
}

}  // namespace bitnet
