// Gradients of attention over dense arrays.
#include "base/arena.h"
#include "base/parallel_rows.h"
#include "bind/dense_call.h"

namespace bitnet {
namespace {

struct BackwardCall {
  Call forward;  // `out` has no data unless the result is wanted too
  Dense d_out, dq, dk, dv;
  Dtype d_out_dtype;
  float* stats;  // [batch, kv heads, vectors, kStatFloats]

  BackwardTask task(int64_t index) const;
  // All vectors of kv head `index`, batch entry by batch entry.
  BackwardTask head(int64_t index) const;

 private:
  BackwardTask around(const DenseTask& t, int64_t b, int64_t head) const;
};

BackwardTask BackwardCall::around(const DenseTask& t, int64_t b, int64_t head) const {
  BackwardTask task{};
  task.forward = t;
  const int64_t first_head = t.first_head;
  task.d_out = {d_out.entry(b) + first_head * d_out.head_stride * d_out.item, d_out_dtype,
                d_out.row_stride, d_out.head_stride};
  task.stats = stats + (b * forward.k.heads + head) * forward.vectors * kStatFloats;
  task.dq = at<float>(dq.entry(b), first_head * dq.head_stride);
  task.dk = at<float>(dk.entry(b), head * dk.head_stride);
  task.dv = at<float>(dv.entry(b), head * dv.head_stride);
  task.dq_stride = dq.row_stride, task.dq_head = dq.head_stride;
  task.dk_stride = dk.row_stride, task.dv_stride = dv.row_stride;
  return task;
}

BackwardTask BackwardCall::task(int64_t index) const {
  const int64_t head = index / forward.blocks;
  return around(forward.task(index), head / forward.k.heads, head % forward.k.heads);
}

BackwardTask BackwardCall::head(int64_t index) const {
  BackwardTask t = task(index * forward.blocks);
  t.forward.first = 0;
  t.forward.count = int32_t(forward.vectors);
  return t;
}

void run(const AttentionKernels& kernel, const BackwardCall& c) {
  const Call& f = c.forward;
  const int64_t heads = f.batch * f.k.heads, dk = f.common.dk, dv = f.common.dv;
  const bool serial = heads * f.vectors * f.k.rows * (dk + dv) < kSerialWork;
  const auto limit = int32_t(f.limit);
  const int64_t floats =
      std::max(state_scratch_floats(f), backward_query_floats(limit, f.common.dk, f.common.dv));
  parallel_rows_scratch(f.tasks(), serial ? f.tasks() : 1, 4 * floats,
                        [&](int64_t begin, int64_t end, char* memory) {
                          for (int64_t i = begin; i < end; ++i) {
                            const BackwardTask t = c.task(i);
                            auto* scratch = reinterpret_cast<float*>(memory);
                            const float* states = run_states(kernel, t.forward, scratch, limit);
                            kernel.backward_stats(t, states);
                            if (t.forward.out) kernel.dense_finish(t.forward, states);
                            kernel.backward_queries(t, scratch);
                          }
                        });
  const int64_t blocks = (f.k.rows + kPageTokens - 1) / kPageTokens;
  if (blocks == 0) return;
  parallel_rows_scratch(heads * blocks, serial ? heads * blocks : 1,
                        4 * backward_key_floats(f.common.dk, f.common.dv),
                        [&](int64_t begin, int64_t end, char* memory) {
                          for (int64_t i = begin; i < end; ++i)
                            kernel.backward_keys(c.head(i / blocks), i % blocks * kPageTokens,
                                                 reinterpret_cast<float*>(memory));
                        });
}

Dense gradient_of(const py::array_t<float>& a, const Dense& like, const char* name) {
  const Dense view = dense_of(a, name, true);
  check_contiguous(view, name);
  if (view.batch_shape != like.batch_shape || view.heads != like.heads || view.rows != like.rows ||
      view.cols != like.cols)
    raise_shape(std::string(name) + ": found " + shape_text(a) + ", wanted the operand's shape");
  return view;
}

void attention_backward(const py::array& d_out, const py::array& q, const py::array& k,
                        const py::array& v, const py::array_t<float>& dq,
                        const py::array_t<float>& dk, const py::array_t<float>& dv,
                        const py::object& out, const py::object& mask, const py::object& lengths,
                        const py::object& seeds, bool causal, int64_t past, int64_t left,
                        int64_t right, float scale, float softcap, double dropout) {
  BackwardCall c;
  Call& f = c.forward;
  f.q = dense_of(q, "q"), f.k = dense_of(k, "k"), f.v = dense_of(v, "v");
  c.d_out = dense_of(d_out, "d_out");
  check_contiguous(f.q, "q"), check_contiguous(f.k, "k"), check_contiguous(f.v, "v");
  check_contiguous(c.d_out, "d_out");
  c.dq = gradient_of(dq, f.q, "dq"), c.dk = gradient_of(dk, f.k, "dk");
  c.dv = gradient_of(dv, f.v, "dv");
  if (out.is_none())
    f.out = c.d_out, f.out.data = nullptr;
  else
    f.out = gradient_of(py::reinterpret_borrow<py::array_t<float>>(out), c.d_out, "out");
  f.common = common_task(f, {causal, past, left, right, scale, softcap, dropout, false});
  f.common.q.dtype = float_dtype(q, "q");
  f.common.k.dtype = float_dtype(k, "k"), f.common.v.dtype = float_dtype(v, "v");
  c.d_out_dtype = float_dtype(d_out, "d_out");
  add_mask(f, mask);
  check_shapes(f);
  for (const int64_t n : f.q.batch_shape) f.batch *= n;
  f.lengths = values_of<int64_t>(lengths, f.batch, "kv_lengths");
  f.seeds = values_of<uint64_t>(seeds, f.batch, "seed");
  f.cut();
  if (f.tasks() == 0) return;  // no dq to write, and nothing to add
  const py::gil_scoped_release unlocked;
  const Buffer stats(size_t(f.batch * f.k.heads * f.vectors * kStatFloats) * sizeof(float));
  c.stats = static_cast<float*>(stats.data());
  const AttentionKernels& kernel = *kernels().attention;
  const FpEnv environment;
  const int64_t queries = f.q.heads * f.q.rows * (2 * f.q.cols + 2 * f.v.cols);
  const int64_t keys = f.k.heads * f.k.rows * 2 * (f.k.cols + f.v.cols);
  const MetricsScope metrics("attention_backward", kernel.isa, f.batch * 4 * (queries + keys));
  run(kernel, c);
}

}  // namespace

void bind_attention_backward(py::module_& m) {
  m.def("attention_backward", &attention_backward, py::arg("d_out"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("out").none(true),
        py::arg("mask").none(true), py::arg("kv_lengths").none(true), py::arg("seeds").none(true),
        py::arg("causal"), py::arg("past_len"), py::arg("left"), py::arg("right"), py::arg("scale"),
        py::arg("softcap"), py::arg("dropout_p"));
}

}  // namespace bitnet
