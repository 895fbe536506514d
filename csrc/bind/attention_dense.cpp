// attention over dense arrays.
#include "base/parallel_rows.h"
#include "bind/dense_call.h"
#include "run/run.h"

namespace bitnet {
namespace {

constexpr int64_t kSplitFloats = 1 << 20;  // states of all chunks when tasks are split by chunk

ScoreKind score_kind(const std::string& name) {
  if (name == "raw") return ScoreKind::raw;
  if (name == "softcap") return ScoreKind::softcap;
  if (name == "mask") return ScoreKind::mask;
  if (name == "softmax") return ScoreKind::softmax;
  raise_shape("return_scores: found '" + name + "', wanted raw, softcap, mask or softmax");
}

void run_whole(const AttentionKernels& kernel, const Call& call, int64_t step) {
  const int64_t bytes = 4 * state_scratch_floats(call);
  parallel_rows_scratch(call.tasks(), step, bytes, [&](int64_t begin, int64_t end, char* memory) {
    for (int64_t i = begin; i < end; ++i) {
      const DenseTask t = call.task(i);
      kernel.dense_finish(t, run_states(kernel, t, reinterpret_cast<float*>(memory), call.limit));
    }
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
  c.cut();
  const Kernels& table = kernels();
  AttentionKernels kernel = *table.attention;
  if (c.common.int8) {
    kernel.isa = table.attention_int8->isa;
    kernel.dense_chunk = table.attention_int8->chunk;
  }
  const FpEnv environment;
  const MetricsScope metrics("attention", kernel.isa, bytes_of(c));
  run(kernel, c);
}

Dense view_of(const HeadsView& a, int64_t batch) {
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
  c.q = view_of(a.q, a.batch), c.k = view_of(a.k, a.batch);
  c.v = view_of(a.v, a.batch), c.out = view_of(a.out, a.batch);
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
