// Norms, their quantised form, their gradients.
#include "bind/rows.h"
#include "run/run.h"

namespace bitnet {
namespace {

// Gradients of the parameters are summed over blocks of so many rows, and the blocks in ascending
// order, whatever the number of threads.
constexpr int64_t kGradRows = 64;

float* statistic(const py::object& out, int64_t rows, const char* name) {
  if (out.is_none()) return nullptr;
  return vector_of<float>(py::reinterpret_borrow<py::array>(out), rows, name, true);
}

void norm(const py::array& x, const py::object& weight, const py::object& bias, float eps,
          const std::string& kind, const py::array& out, const py::object& mean,
          const py::object& inv_std) {
  const Rows<float> in = rows_of<float>(x, "x");
  const Norm spec = norm_of(weight, bias, eps, kind, in.cols);
  const Rows<float> y = exact_rows<float>(out, in.rows, in.cols, "out", true);
  const NormStats stats = {statistic(mean, in.rows, "mean"),
                           statistic(inv_std, in.rows, "inv_std")};
  const py::gil_scoped_release nogil;
  run_norm(in, spec, stats, {y.data, y.stride});
}

void norm_quant(const py::array& x, const py::object& weight, const py::object& bias, float eps,
                const std::string& kind, const py::array& q, const py::array& scales) {
  const Rows<float> in = rows_of<float>(x, "x");
  const Norm spec = norm_of(weight, bias, eps, kind, in.cols);
  const Rows<int8_t> codes = exact_rows<int8_t>(q, in.rows, in.cols, "q", true);
  const Quantised out{codes.data, codes.stride, vector_of<float>(scales, in.rows, "s", true)};
  const py::gil_scoped_release nogil;
  run_norm_quant({in.data, in.stride, in.cols}, spec, out, in.rows);
}

// out[i] = the sum of partial[b][i] over the blocks b.
void add_blocks(const float* partial, int64_t blocks, int64_t stride, float* out, int64_t width) {
  for (int64_t i = 0; i < width; ++i) out[i] = 0.0f;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < width; ++i) out[i] += partial[b * stride + i];
  for (int64_t i = 0; i < width; ++i)
    if (out[i] != out[i]) out[i] = __builtin_nanf("");
}

void norm_backward(const py::array& dy, const py::array& x, const py::object& weight, float eps,
                   const std::string& kind, const py::array& dx, const py::object& dweight,
                   const py::object& dbias) {
  const Rows<float> in = rows_of<float>(x, "x");
  const Rows<float> grad = exact_rows<float>(dy, in.rows, in.cols, "grad");
  const Norm spec = norm_of(weight, py::none(), eps, kind, in.cols);
  if (spec.kind == NormKind::none) raise_shape("kind: found 'none', wanted 'rms' or 'layer'");
  const Rows<float> out = exact_rows<float>(dx, in.rows, in.cols, "grad_x", true);
  float* weights = statistic(dweight, in.cols, "grad_weight");
  float* biases = statistic(dbias, in.cols, "grad_bias");
  const int64_t blocks = (in.rows + kGradRows - 1) / kGradRows;
  const int64_t stride = in.cols * ((weights != nullptr) + (biases != nullptr));
  const Buffer partials(size_t(std::max<int64_t>(1, blocks * stride)) * sizeof(float));
  const py::gil_scoped_release nogil;
  const FpEnv environment;
  const RowwiseKernels& k = *kernels().rowwise;
  const MetricsScope metrics("norm_backward", k.isa, in.rows * in.cols * 12);
  const RowsIn rows{in.data, in.stride, in.cols}, grads{grad.data, grad.stride, grad.cols};
  float* sums = static_cast<float*>(partials.data());  // [blocks][weight, bias][width]
  parallel_for(blocks, [&](int64_t b) {
    float* w = weights ? sums + b * stride : nullptr;
    float* bias = biases ? sums + b * stride + (weights ? in.cols : 0) : nullptr;
    k.norm_backward(rows, spec, grads, {out.data, out.stride}, w, bias, b * kGradRows,
                    std::min(in.rows, (b + 1) * kGradRows));
  });
  if (weights) add_blocks(sums, blocks, stride, weights, in.cols);
  if (biases) add_blocks(sums + (weights ? in.cols : 0), blocks, stride, biases, in.cols);
}

}  // namespace

Norm norm_of(const py::object& weight, const py::object& bias, float eps, const std::string& kind,
             int64_t width) {
  Norm norm{};
  if (kind == "rms")
    norm.kind = NormKind::rms;
  else if (kind == "layer")
    norm.kind = NormKind::layer;
  else if (kind == "none")
    norm.kind = NormKind::none;
  else
    raise_shape("kind: found '" + kind + "', wanted 'rms', 'layer' or 'none'");
  norm.eps = eps;
  norm.weight = optional_vector<float>(weight, width, "weight");
  norm.bias = optional_vector<float>(bias, width, "bias");
  return norm;
}

void bind_norms(py::module_& m) {
  m.def("norm", &norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
        py::arg("kind"), py::arg("out"), py::arg("mean") = py::none(),
        py::arg("inv_std") = py::none());
  m.def("norm_quant", &norm_quant, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
        py::arg("kind"), py::arg("q"), py::arg("s"));
  m.def("norm_backward", &norm_backward, py::arg("grad"), py::arg("x"), py::arg("weight"),
        py::arg("eps"), py::arg("kind"), py::arg("grad_x"), py::arg("grad_weight"),
        py::arg("grad_bias"));
}

}  // namespace bitnet
