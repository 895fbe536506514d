// Causal mask fills.
#include "base/threads.h"
#include "bind/bind.h"

namespace bitnet {
namespace {

constexpr int64_t kTaskBytes = 1 << 18;  // less than this is not worth a second thread

void mask_fill(const py::array& out, uint32_t attend, uint32_t hide, int64_t q_len, int64_t k_len,
               int64_t past, int64_t left, int64_t prefix) {
  const int64_t size = out.itemsize();
  if (out.ndim() != 2 || (size != 1 && size != 2 && size != 4) || !out.writeable() ||
      (out.size() > 0 && out.shape(1) > 1 && out.strides(1) != size))
    raise_shape("out: found " + shape_text(out) + ", wanted writable rows of contiguous elements");
  const int64_t rows = out.shape(0), width = out.shape(1);
  if (q_len < 0 || q_len > rows || k_len < 0 || k_len > width || past < 0 || prefix < 0 ||
      left < kUnbounded)
    raise_shape("mask: found q_len " + std::to_string(q_len) + ", k_len " + std::to_string(k_len) +
                ", past " + std::to_string(past) + " for " + shape_text(out));
  const MaskPattern pattern = {
      q_len,         k_len,  past, left, prefix, width, rows ? out.strides(0) : 0,
      int32_t(size), attend, hide};
  void* data = const_cast<void*>(out.data());
  py::gil_scoped_release release;
  const MaskKernels& kernel = *kernels().mask;
  const MetricsScope scope("mask_fill", kernel.isa, rows * width * size);
  const int64_t row_bytes = width * size > 0 ? width * size : 1;
  const int64_t rows_per_task = kTaskBytes / row_bytes > 0 ? kTaskBytes / row_bytes : 1;
  parallel_for((rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    const int64_t begin = task * rows_per_task;
    kernel.fill(data, &pattern, begin, begin + rows_per_task < rows ? begin + rows_per_task : rows);
  });
}

}  // namespace

void bind_mask(py::module_& m) {
  m.def("mask_fill", &mask_fill, py::arg("out"), py::arg("attend"), py::arg("hide"),
        py::arg("q_len"), py::arg("k_len"), py::arg("past"), py::arg("left"), py::arg("prefix"));
}

}  // namespace bitnet
