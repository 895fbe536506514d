// Rows of a matrix in memory, as bindings and drivers hand them on.
#pragma once
#include <cstdint>

namespace bitnet {

// A 2-D array whose rows are contiguous and may be further apart than their length.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t rows = 0, cols = 0, stride = 0;  // stride in elements
  T* row(int64_t r) const { return data + r * stride; }
};

}  // namespace bitnet
