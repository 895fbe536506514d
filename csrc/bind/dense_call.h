// Attention over dense arrays and its gradients: views of arguments, checked, and work cut into
// tasks.
#pragma once
#include <algorithm>
#include <vector>

#include "bind/bind.h"

namespace bitnet {

constexpr int64_t kSerialWork = 1 << 15;  // fewer multiplications: done before a thread wakes

// A view [..., heads, rows, cols] with contiguous columns; strides in elements.
struct Dense {
  const char* data = nullptr;
  int64_t item = 0;
  std::vector<int64_t> batch_shape, batch_strides;
  int64_t heads = 0, rows = 0, cols = 0;
  int64_t head_stride = 0, row_stride = 0, col_stride = 1;

  // Element 0 of batch entry b.
  const char* entry(int64_t b) const {
    int64_t offset = 0;
    for (size_t axis = batch_shape.size(); axis-- > 0; b /= batch_shape[axis])
      offset += b % batch_shape[axis] * batch_strides[axis];
    return data + offset * item;
  }
};

Dense dense_of(const py::array& a, const char* name, bool writable = false);
void check_contiguous(const Dense& view, const char* name);
// float32, float16, or the bits of bfloat16 in uint16.
Dtype float_dtype(const py::array& a, const char* name);

template <class T>
std::vector<T> values_of(const py::object& a, int64_t batch, const char* name) {
  const T* data = optional_vector<T>(a, batch, name);
  return data ? std::vector<T>(data, data + batch) : std::vector<T>();
}

// One call: the views, and what every task has in common.
struct Call {
  Dense q, k, v, mask, scores, out;
  std::vector<int64_t> lengths;
  std::vector<uint64_t> seeds;
  DenseTask common{};
  int64_t batch = 1, vectors = 0, limit = 0, blocks = 0;  // vectors and blocks: of a kv head

  // Cuts the vectors into tasks.
  void cut();
  int64_t tasks() const { return batch * k.heads * blocks; }
  DenseTask task(int64_t index) const;
};

struct Options {
  bool causal;
  int64_t past, left, right;
  float scale, softcap;
  double dropout;
  bool int8;
};

// What the tasks of a call have in common, from its views of q, k, v.
DenseTask common_task(const Call& c, const Options& o);
void add_mask(Call& c, const py::object& mask);
void check_shapes(const Call& c);

template <class T>
T* at(const char* data, int64_t elements) {
  return const_cast<T*>(reinterpret_cast<const T*>(data)) + elements;
}

// The chunks of keys that a task visits.
struct Chunks {
  int64_t first, count;
};
Chunks chunks_of(const DenseTask& t);

int64_t scratch_floats(const DenseTask& t, int64_t limit);
// Floats that run_states needs.
int64_t state_scratch_floats(const Call& c);
// The states of a task over all its keys, in one thread; returns them, within `memory`.
float* run_states(const AttentionKernels& kernel, const DenseTask& t, float* memory, int64_t limit);

}  // namespace bitnet
