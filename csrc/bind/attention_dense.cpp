// attention over dense arrays: arguments checked, work cut into tasks.
#include <algorithm>
#include <cmath>
#include <vector>

#include "base/threads.h"
#include "bind/bind.h"
#include "bind/rows.h"
#include "run/run.h"

namespace bitnet {
namespace {

constexpr int64_t kSerialWork = 1 << 15;    // fewer multiplications: done before a thread wakes
constexpr int64_t kStateFloats = 96 << 10;  // two states of every vector of a task, to stay in L2
constexpr int64_t kSplitFloats = 1 << 20;   // states of all chunks when tasks are split by chunk

std::string text(int64_t n) { return std::to_string(n); }

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

Dense dense_of(const py::array& a, const char* name, bool writable = false) {
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

// float32, float16, or the bits of bfloat16 in uint16.
Dtype float_dtype(const py::array& a, const char* name) {
  const char kind = a.dtype().kind();
  if (kind == 'f' && a.itemsize() == 4) return Dtype::f32;
  if (kind == 'f' && a.itemsize() == 2) return Dtype::f16;
  if (kind == 'u' && a.itemsize() == 2) return Dtype::bf16;
  raise_shape(std::string(name) + ": found " + shape_text(a) +
              ", wanted float32, float16 or bfloat16");
}

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

ScoreKind score_kind(const std::string& name) {
  if (name == "raw") return ScoreKind::raw;
  if (name == "softcap") return ScoreKind::softcap;
  if (name == "mask") return ScoreKind::mask;
  if (name == "softmax") return ScoreKind::softmax;
  raise_shape("return_scores: found '" + name + "', wanted raw, softcap, mask or softmax");
}

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

  int64_t tasks() const { return batch * k.heads * blocks; }
  DenseTask task(int64_t index) const;
};

template <class T>
T* at(const char* data, int64_t elements) {
  return const_cast<T*>(reinterpret_cast<const T*>(data)) + elements;
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
  t.out = at<float>(out.entry(b), first_head * out.head_stride);
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
void cut(Call& c) {
  const int64_t size = state_floats(c.common.dv);
  const int64_t fitting = kStateFloats / (2 * size) / kTileVectors * kTileVectors;
  const int64_t all = c.batch * c.k.heads * c.vectors;
  const int64_t shared = (all / (4 * num_threads()) / kTileVectors + 1) * kTileVectors;
  c.limit = std::max<int64_t>(kTileVectors, std::min(fitting, shared));
  c.blocks = (c.vectors + c.limit - 1) / c.limit;
}

// The chunks of keys that a task visits.
struct Chunks {
  int64_t first, count;
};

Chunks chunks_of(const DenseTask& t) {
  const Extent keys = keys_of(t);
  if (keys.high <= keys.low) return {0, 0};
  const int64_t first = keys.low / kChunkTokens;
  return {first, (keys.high - 1) / kChunkTokens - first + 1};
}

int64_t scratch_floats(const DenseTask& t, int64_t limit) {
  return (dense_scratch_floats(int32_t(limit), t.dk, t.dv) + 15) / 16 * 16;
}

// All chunks of a task in one thread.
void run_task(const AttentionKernels& kernel, const DenseTask& t, float* memory, int64_t limit) {
  float* states = memory + scratch_floats(t, limit);
  float* part = states + limit * state_floats(t.dv);
  const Chunks chunks = chunks_of(t);
  kernel.dense_chunk(t, chunks.first, states, memory);  // clears them when there is no chunk
  for (int64_t c = 1; c < chunks.count; ++c) {
    kernel.dense_chunk(t, chunks.first + c, part, memory);
    kernel.merge(states, part, t.count, t.dv);
  }
  kernel.dense_finish(t, states);
}

void run_whole(const AttentionKernels& kernel, const Call& call, int64_t step) {
  const int64_t floats =
      scratch_floats(call.common, call.limit) + 2 * call.limit * state_floats(call.common.dv);
  parallel_rows_scratch(
      call.tasks(), step, 4 * floats, [&](int64_t begin, int64_t end, char* memory) {
        for (int64_t i = begin; i < end; ++i)
          run_task(kernel, call.task(i), reinterpret_cast<float*>(memory), call.limit);
      });
}

// A thread for each chunk of few vectors that see many keys.
void run_split(const AttentionKernels& kernel, const Call& call, int64_t most, float* states) {
  const int64_t size = call.limit * state_floats(call.common.dv);
  const int64_t floats = scratch_floats(call.common, call.limit);
  parallel_rows_scratch(call.tasks() * most, 1, 4 * floats,
                        [&](int64_t begin, int64_t end, char* memory) {
                          for (int64_t i = begin; i < end; ++i) {
                            const DenseTask t = call.task(i / most);
                            const Chunks chunks = chunks_of(t);
                            if (i % most < std::max<int64_t>(1, chunks.count))
                              kernel.dense_chunk(t, chunks.first + i % most, states + i * size,
                                                 reinterpret_cast<float*>(memory));
                          }
                        });
  for (int64_t i = 0; i < call.tasks(); ++i, states += most * size) {
    const DenseTask t = call.task(i);
    for (int64_t c = 1; c < chunks_of(t).count; ++c)
      kernel.merge(states, states + c * size, t.count, t.dv);
    kernel.dense_finish(t, states);
  }
}

void run(const AttentionKernels& kernel, const Call& call) {
  const int64_t tasks = call.tasks(), dv = call.common.dv;
  if (tasks == 0) return;
  const int64_t products =
      call.batch * call.k.heads * call.vectors * call.k.rows * (call.common.dk + dv);
  if (products < kSerialWork) return run_whole(kernel, call, tasks);
  int64_t most = 1;
  for (int64_t i = 0; i < std::min(tasks, call.blocks); ++i)
    most = std::max(most, chunks_of(call.task(i)).count);
  const int64_t floats = tasks * most * call.limit * state_floats(call.common.dv);
  if (most > 1 && tasks < 4 * num_threads() && floats <= kSplitFloats)
    return run_split(kernel, call, most, static_cast<float*>(call_scratch(4 * floats)));
  run_whole(kernel, call, 1);
}

struct Options {
  bool causal;
  int64_t past, left, right;
  float scale, softcap;
  double dropout;
  bool int8;
};

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
  c.common.mask_step = c.mask.cols == 1 || c.mask.col_stride == 0 ? 0 : 1;
  if (c.common.mask_step == 1) check_contiguous(c.mask, "mask");
  if (c.mask.cols != 1) c.common.valid = std::min(c.common.valid, c.mask.cols);
}

void add_scores(Call& c, const py::object& scores, const std::string& kind) {
  if (scores.is_none()) return;
  const auto array = py::reinterpret_borrow<py::array_t<float>>(scores);
  c.scores = dense_of(array, "scores", true);
  check_contiguous(c.scores, "scores");
  c.common.score_kind = score_kind(kind);
  c.common.score_stride = c.scores.row_stride, c.common.score_head = c.scores.head_stride;
}

int64_t bytes_of(const Call& c) {
  const int64_t q = c.q.heads * c.q.rows * (c.q.cols * c.q.item + c.out.cols * 4);
  return c.batch * (q + c.k.heads * c.k.rows * (c.k.cols * c.k.item + c.v.cols * c.v.item));
}

void run_counted(Call& c) {
  c.vectors = c.q.rows * c.common.group;
  cut(c);
  const AttentionKernels& kernel = *kernels().attention;
  const FpEnv environment;
  const MetricsScope metrics("attention", kernel.isa, bytes_of(c));
  run(kernel, c);
}

Dense dense_of(const HeadsView& a, int64_t batch) {
  Dense view;
  view.data = reinterpret_cast<const char*>(a.data);
  view.item = sizeof(float);
  view.batch_shape = {batch}, view.batch_strides = {a.batch_stride};
  view.heads = a.heads, view.rows = a.rows, view.cols = a.size;
  view.head_stride = a.head_stride, view.row_stride = a.row_stride;
  return view;
}

void attention(const py::array& q, const py::array& k, const py::array& v,
               const py::array_t<float>& out, const py::object& mask, const py::object& lengths,
               const py::object& seeds, bool causal, int64_t past, int64_t left, int64_t right,
               float scale, float softcap, double dropout, bool int8, const py::object& scores,
               const std::string& kind) {
  Call c;
  c.q = dense_of(q, "q"), c.k = dense_of(k, "k"), c.v = dense_of(v, "v");
  c.out = dense_of(out, "out", true);
  check_contiguous(c.q, "q"), check_contiguous(c.k, "k"), check_contiguous(c.v, "v");
  check_contiguous(c.out, "out");
  c.common = common_task(c, {causal, past, left, right, scale, softcap, dropout, int8});
  c.common.q.dtype = float_dtype(q, "q");
  c.common.k.dtype = float_dtype(k, "k"), c.common.v.dtype = float_dtype(v, "v");
  add_mask(c, mask);
  add_scores(c, scores, kind);
  check_shapes(c);
  for (const int64_t n : c.q.batch_shape) c.batch *= n;
  c.lengths = values_of<int64_t>(lengths, c.batch, "kv_lengths");
  c.seeds = values_of<uint64_t>(seeds, c.batch, "seed");
  py::gil_scoped_release unlocked;
  run_counted(c);
}

}  // namespace

void run_attention(const AttentionCall& a) {
  Call c;
  c.q = dense_of(a.q, a.batch), c.k = dense_of(a.k, a.batch);
  c.v = dense_of(a.v, a.batch), c.out = dense_of(a.out, a.batch);
  c.common = common_task(c, {a.causal, a.past, a.left, a.right, a.scale, a.softcap, 0.0, false});
  c.batch = a.batch;
  if (a.kv_lengths) c.lengths.assign(a.kv_lengths, a.kv_lengths + a.batch);
  run_counted(c);
}

void bind_attention_dense(py::module_& m) {
  m.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
        py::arg("mask").none(true), py::arg("kv_lengths").none(true), py::arg("seeds").none(true),
        py::arg("causal"), py::arg("past_len"), py::arg("left"), py::arg("right"), py::arg("scale"),
        py::arg("softcap"), py::arg("dropout_p"), py::arg("int8"), py::arg("scores").none(true),
        py::arg("score_kind"));
}

}  // namespace bitnet
