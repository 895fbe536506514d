#include "bind/dense_call.h"

#include <cmath>

#include "base/threads.h"

namespace bitnet {
namespace {

constexpr int64_t kStateFloats = 96 << 10;  // two states of every vector of a task, to stay in L2
constexpr int64_t kFewVectors = 48;         // of a kv head: one task reads its keys once for all

MaskKind mask_kind(const py::array& a) {
  if (a.dtype().kind() == 'b') return MaskKind::boolean;
  switch (float_dtype(a, "mask")) {
    case Dtype::f32:
      return MaskKind::f32;
    case Dtype::f16:
      return MaskKind::f16;
    default:
      return MaskKind::bf16;
  }
}

}  // namespace

Dense dense_of(const py::array& a, const char* name, bool writable) {
  Dense view;
  view.data = static_cast<const char*>(a.data());
  view.item = a.itemsize();
  const int64_t rank = a.ndim();
  if (rank < 3) raise_shape(std::string(name) + ": found " + shape_text(a) + ", wanted 3 axes");
  if (writable && !a.writeable()) raise_shape(std::string(name) + ": the array is read-only");
  const auto stride = [&](int64_t axis) {
    if (a.shape(axis) > 1 && a.size() > 0 && a.strides(axis) % view.item != 0)
      raise_shape(std::string(name) + ": found strides that are no multiple of the element");
    return int64_t(a.strides(axis)) / view.item;
  };
  for (int64_t axis = 0; axis < rank - 3; ++axis) {
    view.batch_shape.push_back(a.shape(axis));
    view.batch_strides.push_back(stride(axis));
  }
  view.heads = a.shape(rank - 3), view.head_stride = stride(rank - 3);
  view.rows = a.shape(rank - 2), view.row_stride = stride(rank - 2);
  view.cols = a.shape(rank - 1), view.col_stride = a.size() > 0 ? stride(rank - 1) : 1;
  return view;
}

void check_contiguous(const Dense& view, const char* name) {
  if (view.cols > 1 && view.col_stride != 1)
    raise_shape(std::string(name) + ": the last axis must be contiguous");
}

Dtype float_dtype(const py::array& a, const char* name) {
  const char kind = a.dtype().kind();
  if (kind == 'f' && a.itemsize() == 4) return Dtype::f32;
  if (kind == 'f' && a.itemsize() == 2) return Dtype::f16;
  if (kind == 'u' && a.itemsize() == 2) return Dtype::bf16;
  raise_shape(std::string(name) + ": found " + shape_text(a) +
              ", wanted float32, float16 or bfloat16");
}

// Task `index`: batch entry, then kv head, then vectors from the last ones on: under a causal mask
// those take longest, and a thread that comes to an end late should have a short one.
DenseTask Call::task(int64_t index) const {
  const int64_t block = blocks - 1 - index % blocks, head = index / blocks % k.heads;
  const int64_t b = index / blocks / k.heads;
  DenseTask t = common;
  const int64_t first_head = head * t.group;
  t.q.data = q.entry(b) + first_head * q.head_stride * q.item;
  t.k.data = k.entry(b) + head * k.head_stride * k.item;
  t.v.data = v.entry(b) + head * v.head_stride * v.item;
  t.first_head = int32_t(first_head);
  t.first = block * limit;
  t.count = int32_t(std::min(limit, vectors - t.first));
  if (!lengths.empty()) {
    t.valid = std::min(t.valid, lengths[size_t(b)]);
    t.offset = lengths[size_t(b)] - q.rows;
  }
  if (mask.data) t.mask = mask.entry(b) + first_head * mask.head_stride * mask.item;
  if (!seeds.empty()) t.seed = seeds[size_t(b)];
  if (scores.data) t.scores = at<float>(scores.entry(b), first_head * scores.head_stride);
  if (out.data) t.out = at<float>(out.entry(b), first_head * out.head_stride);
  return t;
}

void check_shapes(const Call& c) {
  const int64_t tk = c.k.rows;
  const bool batches = c.k.batch_shape == c.q.batch_shape && c.v.batch_shape == c.q.batch_shape &&
                       c.out.batch_shape == c.q.batch_shape;
  if (!batches || c.k.cols != c.q.cols || c.v.heads != c.k.heads || c.v.rows != tk ||
      c.out.heads != c.q.heads || c.out.rows != c.q.rows || c.out.cols != c.v.cols ||
      (c.k.heads == 0 ? c.q.heads != 0 : c.q.heads % c.k.heads != 0))
    raise_shape(
        "q, k, v, out: found shapes that do not fit, wanted [..., Hq, Tq, Dk], "
        "[..., Hkv, Tk, Dk], [..., Hkv, Tk, Dv], [..., Hq, Tq, Dv]");
  if (c.q.cols < 1 || c.q.cols > kMaxHeadDim || c.v.cols > kMaxHeadDim)
    raise_shape("q, v: found head sizes " + text(c.q.cols) + " and " + text(c.v.cols) +
                ", wanted 1 to " + text(kMaxHeadDim));
  if (c.mask.data && (c.mask.batch_shape != c.q.batch_shape || c.mask.heads != c.q.heads ||
                      c.mask.rows != c.q.rows || c.mask.cols > std::max<int64_t>(tk, 1)))
    raise_shape("mask: wanted [..., Hq, Tq, up to Tk]");
  if (c.scores.data && (c.scores.batch_shape != c.q.batch_shape || c.scores.heads != c.q.heads ||
                        c.scores.rows != c.q.rows || c.scores.cols != tk))
    raise_shape("scores: wanted [..., Hq, Tq, Tk]");
}

// How many vectors a task takes: few enough for every thread to have several tasks and for the
// states to stay in cache; many, as each task packs its keys again.
void Call::cut() {
  vectors = q.rows * common.group;
  const int64_t size = state_floats(common.dv);
  const int64_t fitting = kStateFloats / (2 * size) / kTileVectors * kTileVectors;
  const int64_t all = batch * k.heads * vectors;
  int64_t shared = (all / (4 * num_threads()) / kTileVectors + 1) * kTileVectors;
  if (vectors <= kFewVectors) shared = std::max(shared, vectors);
  limit = std::max<int64_t>(kTileVectors, std::min(fitting, shared));
  blocks = (vectors + limit - 1) / limit;
}

DenseTask common_task(const Call& c, const Options& o) {
  DenseTask t{};
  t.dk = int32_t(c.q.cols), t.dv = int32_t(c.v.cols);
  t.group = int32_t(c.k.heads ? c.q.heads / c.k.heads : 1);
  t.q.stride = c.q.row_stride, t.q.head_stride = c.q.head_stride;
  t.k.stride = c.k.row_stride, t.v.stride = c.v.row_stride;
  t.keys = t.valid = c.k.rows;
  t.offset = o.past;
  t.left = o.left < 0 ? kFar : std::min(o.left, kFar);
  t.right = o.causal ? 0 : o.right < 0 ? kFar : std::min(o.right, kFar);
  t.scale = o.scale, t.softcap = o.softcap, t.int8 = o.int8;
  t.dropped = float(std::rint(o.dropout * 0x1p24));
  t.kept_scale = float(1.0 / (1.0 - o.dropout));
  t.out_stride = c.out.row_stride, t.out_head = c.out.head_stride;
  return t;
}

void add_mask(Call& c, const py::object& mask) {
  if (mask.is_none()) return;
  const auto array = py::reinterpret_borrow<py::array>(mask);
  c.mask = dense_of(array, "mask");
  c.common.mask_kind = mask_kind(array);
  c.common.mask_stride = c.mask.row_stride, c.common.mask_head = c.mask.head_stride;
  c.common.mask_step = c.mask.cols == 1 ? 0 : c.mask.col_stride;
  if (c.mask.cols != 1) c.common.valid = std::min(c.common.valid, c.mask.cols);
}

Chunks chunks_of(const DenseTask& t) {
  const Extent keys = keys_of(t);
  if (keys.high <= keys.low) return {0, 0};
  const int64_t first = keys.low / kChunkTokens;
  return {first, (keys.high - 1) / kChunkTokens - first + 1};
}

int64_t scratch_floats(const DenseTask& t, int64_t limit) {
  return (dense_scratch_floats(int32_t(limit), t.dk, t.dv) + 15) / 16 * 16;
}

int64_t state_scratch_floats(const Call& c) {
  return scratch_floats(c.common, c.limit) + 2 * c.limit * state_floats(c.common.dv);
}

float* run_states(const AttentionKernels& kernel, const DenseTask& t, float* memory,
                  int64_t limit) {
  float* states = memory + scratch_floats(t, limit);
  float* part = states + limit * state_floats(t.dv);
  const Chunks chunks = chunks_of(t);
  kernel.dense_chunk(t, chunks.first, states, memory);  // clears them when there is no chunk
  for (int64_t c = 1; c < chunks.count; ++c) {
    kernel.dense_chunk(t, chunks.first + c, part, memory);
    kernel.merge(states, part, t.count, t.dv);
  }
  return states;
}

}  // namespace bitnet
