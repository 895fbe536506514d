// What every binding file shares: typed errors and checked views of NumPy arrays.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "base/fpenv.h"
#include "base/matrix_rows.h"
#include "dispatch/dispatch.h"
#include "dispatch/metrics.h"

namespace bitnet {

namespace py = pybind11;

void bind_runtime(py::module_& m);
void bind_ternary(py::module_& m);
void bind_rowwise(py::module_& m);
void bind_norms(py::module_& m);
void bind_vocab(py::module_& m);
void bind_screen(py::module_& m);
void bind_attention(py::module_& m);
void bind_attention_dense(py::module_& m);
void bind_attention_backward(py::module_& m);
void bind_layer(py::module_& m);
void bind_mask(py::module_& m);
void bind_capi(py::module_& m);

// Raises bitnet_ext.errors.<type>(message).
[[noreturn]] void raise_error(const char* type, const std::string& message);
[[noreturn]] inline void raise_shape(const std::string& message) {
  raise_error("InvalidShapeError", message);
}

inline std::string text(int64_t n) { return std::to_string(n); }
// The value, or InvalidShapeError where it is not in [low, high].
inline int64_t bounded(int64_t value, int64_t low, int64_t high, const char* name) {
  if (value < low || value > high)
    raise_shape(std::string(name) + ": found " + text(value) + ", wanted " + text(low) + " to " +
                text(high));
  return value;
}

std::string shape_text(const py::array& a);

// Checks dtype, rank and row contiguity; `name` is what the error calls the array.
template <class T>
Rows<T> rows_of(const py::array& a, const char* name, bool writable = false) {
  if (!py::isinstance<py::array_t<T>>(a) || a.ndim() != 2)
    raise_shape(std::string(name) + ": found " + shape_text(a) + ", wanted a 2-D " +
                std::string(py::str(py::dtype::of<T>())) + " array");
  const int64_t size = int64_t(sizeof(T));
  const bool empty = a.size() == 0;  // NumPy gives it any strides
  const bool contiguous = empty || a.shape(1) <= 1 || a.strides(1) == size;
  const bool spaced =
      empty || a.shape(0) <= 1 || (a.strides(0) >= a.shape(1) * size && a.strides(0) % size == 0);
  if (!contiguous || !spaced)
    raise_shape(std::string(name) + ": rows must be contiguous, found strides of " + shape_text(a));
  if (writable && !a.writeable()) raise_shape(std::string(name) + ": the array is read-only");
  const int64_t stride = a.shape(0) > 1 ? a.strides(0) / size : a.shape(1);
  return {const_cast<T*>(static_cast<const T*>(a.data())), a.shape(0), a.shape(1), stride};
}

// A contiguous 1-D array of exactly `size` elements (any size when negative).
template <class T>
T* vector_of(const py::array& a, int64_t size, const char* name, bool writable = false) {
  if (!py::isinstance<py::array_t<T>>(a) || a.ndim() != 1 || (size >= 0 && a.shape(0) != size) ||
      (a.shape(0) > 1 && a.strides(0) != int64_t(sizeof(T))))
    raise_shape(std::string(name) + ": found " + shape_text(a) + ", wanted contiguous " +
                std::string(py::str(py::dtype::of<T>())) + " [" +
                (size >= 0 ? std::to_string(size) : "n") + "]");
  if (writable && !a.writeable()) raise_shape(std::string(name) + ": the array is read-only");
  return const_cast<T*>(static_cast<const T*>(a.data()));
}

// The same for an argument that may be None: null then.
template <class T>
const T* optional_vector(const py::object& a, int64_t size, const char* name) {
  if (a.is_none()) return nullptr;
  return vector_of<T>(py::reinterpret_borrow<py::array>(a), size, name);
}

}  // namespace bitnet
