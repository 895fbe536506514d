#include "bind/bind.h"

namespace bitnet {

void raise_error(const char* type, const std::string& message) {
  const py::object error = py::module_::import("bitnet_ext.errors").attr(type);
  PyErr_SetString(error.ptr(), message.c_str());
  throw py::error_already_set();
}

std::string shape_text(const py::array& a) {
  return std::string(py::str(a.dtype())) + " " + std::string(py::str(a.attr("shape")));
}

}  // namespace bitnet

PYBIND11_MODULE(_core, m) {
  m.doc() = "Kernels, caches and runtime of bitnet_ext";
  m.attr("__version__") = BITNET_VERSION;
  bitnet::bind_runtime(m);
  bitnet::bind_ternary(m);
  bitnet::bind_rowwise(m);
  bitnet::bind_norms(m);
  bitnet::bind_vocab(m);
  bitnet::bind_screen(m);
  bitnet::bind_attention(m);
  bitnet::bind_attention_dense(m);
  bitnet::bind_attention_backward(m);
  bitnet::bind_layer(m);
  bitnet::bind_mask(m);
  bitnet::bind_capi(m);
}
