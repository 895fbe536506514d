// Arrays and tables of the bindings of row-wise operations.
#pragma once
#include <algorithm>
#include <memory>

#include "base/arena.h"
#include "base/parallel_rows.h"
#include "bind/bind.h"
#include "run/run.h"
#include "vocab/vocab.h"

namespace bitnet {

inline std::string shape_of(int64_t rows, int64_t cols) {
  std::string text("[");  // GCC 12 warns of literal + string&&
  return text.append(std::to_string(rows)).append(", ").append(std::to_string(cols)).append("]");
}

// The same as rows_of, of exactly that shape.
template <class T>
Rows<T> exact_rows(const py::array& a, int64_t rows, int64_t cols, const char* name,
                   bool writable = false) {
  const Rows<T> r = rows_of<T>(a, name, writable);
  if (r.rows != rows || r.cols != cols)
    raise_shape(std::string(name) + ": found " + shape_text(a) + ", wanted " +
                shape_of(rows, cols));
  return r;
}

// Checks kind ("rms", "layer", "none") and the parameters' shapes.
Norm norm_of(const py::object& weight, const py::object& bias, float eps, const std::string& kind,
             int64_t width);

Activation activation_named(const std::string& name);

// An array in counted memory. Raises MemoryError.
template <class T>
py::array_t<T> counted_array(int64_t rows, int64_t cols) {
  auto buffer = std::make_unique<Buffer>(size_t(std::max<int64_t>(1, rows * cols)) * sizeof(T));
  T* data = static_cast<T*>(buffer->data());
  py::capsule owner(buffer.get(), [](void* p) { delete static_cast<Buffer*>(p); });
  buffer.release();
  return py::array_t<T>({rows, cols}, data, owner);
}

struct TableRows {
  const void* data;
  Dtype dtype;
  int64_t rows, cols, stride;  // in elements
  int64_t bytes() const { return rows * cols * element_bytes(); }
  int64_t element_bytes() const { return dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 ? 1 : 2; }
};

// A table as the checkpoint holds it: float32, bits of f16 or bf16 in uint16, int8.
TableRows table_of(const py::array& table, const std::string& dtype);

// Rows of x by a table into rows of `out`; `places`: None, or int32 [rows], which row each takes.
Projection projection_of(const py::array& x, const TableRows& table, const py::object& bias,
                         const py::array& out, const py::object& places);

}  // namespace bitnet
