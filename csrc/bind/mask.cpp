// Causal mask fills.
#include "bind/bind.h"
#include "run/run.h"

namespace bitnet {
namespace {

constexpr int kHalf = 23;  // NPY_HALF

MaskElement element_of(const py::array& out) {
  if (py::isinstance<py::array_t<float>>(out)) return MaskElement::f32;
  if (py::isinstance<py::array_t<bool>>(out)) return MaskElement::boolean;
  const py::dtype dtype = out.dtype();
  if (dtype.num() == kHalf && dtype.byteorder() == '=') return MaskElement::f16;
  raise_shape("out: found " + shape_text(out) + ", wanted float32, float16 or bool");
}

void fill(const py::array& out, int64_t q_len, int64_t k_len, int64_t past, int64_t left,
          int64_t prefix) {
  const MaskElement element = element_of(out);
  const int64_t size = out.itemsize();
  if (out.ndim() != 2 || !out.writeable() ||
      (out.size() > 0 && out.shape(1) > 1 && out.strides(1) != size))
    raise_shape("out: found " + shape_text(out) + ", wanted writable rows of contiguous elements");
  const int64_t rows = out.shape(0), width = out.shape(1);
  const MaskSizes sizes = {q_len, k_len, past, left, prefix};
  if (!mask_sizes_valid(sizes) || q_len > rows || k_len > width)
    raise_shape("mask: found q_len " + std::to_string(q_len) + ", k_len " + std::to_string(k_len) +
                ", past " + std::to_string(past) + ", left " + std::to_string(left) + ", prefix " +
                std::to_string(prefix) + " for " + shape_text(out));
  void* data = const_cast<void*>(out.data());
  const int64_t stride = rows ? out.strides(0) : 0;
  py::gil_scoped_release release;
  run_mask_fill(data, element, sizes, rows, width, stride);
}

}  // namespace

void bind_mask(py::module_& m) {
  m.def("mask_fill", &fill, py::arg("out"), py::arg("q_len"), py::arg("k_len"), py::arg("past"),
        py::arg("left"), py::arg("prefix"));
}

}  // namespace bitnet
