// KVCache, rope_append and attend: arguments checked, work cut into tasks.
#include <algorithm>
#include <vector>

#include "attention/kv_cache.h"
#include "base/threads.h"
#include "bind/bind.h"

namespace bitnet {
namespace {

// Fewer multiplications than this are done before a second thread has woken.
constexpr int64_t kSerialWork = 1 << 15;
constexpr int64_t kAppendRows = 16;         // rows of a task: one K tile when a prompt starts at 0
constexpr int32_t kStackFloats = 48 << 10;  // states of one task
constexpr int64_t kSplitFloats = 1 << 20;   // states of all chunks when tasks are split by chunk

std::string text(int64_t n) { return std::to_string(n); }

// --- the cache --------------------------------------------------------------------------------

Dtype kv_dtype(const std::string& name) {
  if (name == "f32") return Dtype::f32;
  if (name == "f16") return Dtype::f16;
  if (name == "int8") return Dtype::i8;
  raise_shape("kv_dtype: found '" + name + "', wanted f32, f16 or int8");
}

int64_t bounded(int64_t value, int64_t low, int64_t high, const char* name) {
  if (value < low || value > high)
    raise_shape(std::string(name) + ": found " + text(value) + ", wanted " + text(low) + " to " +
                text(high));
  return value;
}

std::unique_ptr<KVCache> make_cache(int64_t layers, int64_t batch, int64_t kv_heads, int64_t dk,
                                    int64_t dv, int64_t max_len, const std::string& dtype) {
  const KVShape shape = {bounded(layers, 1, 1 << 16, "layers"),
                         bounded(kv_heads, 1, 1 << 16, "kv_heads"),
                         bounded(max_len, 1, INT32_MAX - kPageTokens, "max_len"),
                         int32_t(bounded(dk, 1, kMaxHeadDim, "dk")),
                         int32_t(bounded(dv, 1, kMaxHeadDim, "dv")),
                         kv_dtype(dtype)};
  return std::make_unique<KVCache>(shape, bounded(batch, 0, 1 << 24, "batch"));
}

[[noreturn]] void raise_in_use() {
  PyErr_SetString(PyExc_RuntimeError,
                  "cache: in use by another call; give each concurrent call a cache of its own");
  throw py::error_already_set();
}

// Claims the cache for one binding, unless this thread's lease already does.
class Claim : KVCacheUse {
 public:
  explicit Claim(KVCache& cache) : KVCacheUse(cache, false) {
    if (refused()) raise_in_use();
  }
};

class Lease {
 public:
  explicit Lease(std::shared_ptr<KVCache> cache) : cache_(std::move(cache)) {}
  void enter() {
    auto use = std::make_unique<KVCacheUse>(*cache_, true);
    if (use->refused()) raise_in_use();
    use_ = std::move(use);
  }
  void exit() { use_.reset(); }

 private:
  std::shared_ptr<KVCache> cache_;
  std::unique_ptr<KVCacheUse> use_;
};

py::array_t<int32_t> lengths(const KVCache& cache) {
  py::array_t<int32_t> result(cache.batch());
  for (int64_t b = 0; b < cache.batch(); ++b) result.mutable_data()[b] = int32_t(cache.length(b));
  return result;
}

void reserve(KVCache& cache, const py::array& total_lengths) {
  const int32_t* total = vector_of<int32_t>(total_lengths, cache.batch(), "total_lengths");
  for (int64_t b = 0; b < cache.batch(); ++b) {
    if (total[b] < 0) raise_shape("total_lengths: found " + text(total[b]) + ", wanted 0 or more");
    if (total[b] > cache.shape().max_len)
      raise_error("CacheFullError", "cache: sequence " + text(b) + " was asked to hold " +
                                        text(total[b]) + " tokens, wanted at most " +
                                        text(cache.shape().max_len));
  }
  const Claim claim(cache);
  try {
    cache.reserve(total);
  } catch (const std::bad_alloc&) {
    const std::string message = "cache: no memory for more pages of " + text(cache.slab_bytes()) +
                                " bytes beside the " + text(cache.bytes_reserved()) + " it has";
    PyErr_SetString(PyExc_MemoryError, message.c_str());
    throw py::error_already_set();
  }
}

void set_lengths(KVCache& cache, const py::array& values, const char* name, bool grow) {
  const int32_t* n = vector_of<int32_t>(values, cache.batch(), name);
  const Claim claim(cache);
  for (int64_t b = 0; b < cache.batch(); ++b) {
    const int64_t bound = grow ? cache.capacity(b) - cache.length(b) : cache.length(b);
    bounded(n[b], 0, bound, name);
  }
  for (int64_t b = 0; b < cache.batch(); ++b)
    cache.set_length(b, grow ? cache.length(b) + n[b] : n[b]);
}

void select_rows(KVCache& cache, const py::array& rows) {
  const int32_t* index = vector_of<int32_t>(rows, -1, "rows");
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) bounded(index[i], 0, cache.batch() - 1, "rows");
  const Claim claim(cache);
  cache.select(index, rows.shape(0));
}

std::shared_ptr<KVCache> copy_cache(KVCache& cache) {
  const Claim claim(cache);
  py::gil_scoped_release unlocked;
  return cache.copy();
}

// --- rope_append ------------------------------------------------------------------------------

struct Heads {
  int32_t q, kv;
};

// Query heads of rows q | k | v.
Heads heads_of(const Rows<float>& qkv, const KVShape& shape, int64_t layer) {
  bounded(layer, 0, shape.layers - 1, "layer");
  const int64_t rest = qkv.cols - shape.kv_heads * (int64_t(shape.dk) + shape.dv);
  if (rest <= 0 || rest % (shape.kv_heads * shape.dk) != 0)
    raise_shape("qkv: found rows of " + text(qkv.cols) + ", wanted q_heads * " + text(shape.dk) +
                " + " + text(shape.kv_heads) + " * (" + text(shape.dk) + " + " + text(shape.dv) +
                ") with q_heads a multiple of " + text(shape.kv_heads));
  return {int32_t(rest / shape.dk), int32_t(shape.kv_heads)};
}

Rows<float> rope_table(const py::object& table, int64_t cols, const char* name) {
  if (table.is_none()) return {};
  const Rows<float> rows = rows_of<float>(py::reinterpret_borrow<py::array>(table), name);
  if (rows.cols != cols)
    raise_shape(std::string(name) + ": found rows of " + text(rows.cols) + ", wanted " +
                text(cols));
  return rows;
}

void check_slots(const KVCache& cache, const int32_t* seq, const int32_t* pos, int64_t rows,
                 int64_t angles) {
  for (int64_t i = 0; i < rows; ++i) {
    bounded(seq[i], 0, cache.batch() - 1, "seq");
    bounded(pos[i], cache.length(seq[i]), cache.capacity(seq[i]) - 1, "pos");
    if (angles >= 0) bounded(pos[i], 0, angles - 1, "pos (rows of cos)");
  }
}

void rope_append(const py::array& qkv_array, const py::object& cos_table,
                 const py::object& sin_table, KVCache& cache, int64_t layer,
                 const py::array& seq_array, const py::array& pos_array) {
  const Rows<float> qkv = rows_of<float>(qkv_array, "qkv", true);
  const KVShape& shape = cache.shape();
  const Heads heads = heads_of(qkv, shape, layer);
  const Rows<float> cos = rope_table(cos_table, shape.dk / 2, "cos");
  const Rows<float> sin = rope_table(sin_table, shape.dk / 2, "sin");
  if (!cos.data != !sin.data || cos.rows != sin.rows || (cos.data && shape.dk % 2 != 0))
    raise_shape("cos, sin: found different shapes or an odd dk, wanted two tables of [P, dk / 2]");
  const int32_t* seq = vector_of<int32_t>(seq_array, qkv.rows, "seq");
  const int32_t* pos = vector_of<int32_t>(pos_array, qkv.rows, "pos");
  const Claim claim(cache);
  check_slots(cache, seq, pos, qkv.rows, cos.data ? cos.rows : -1);

  const AttentionKernels& kernel = *kernels().attention;
  py::gil_scoped_release unlocked;
  const MetricsScope metrics("rope_append", kernel.isa, 8 * qkv.rows * qkv.cols);
  const int64_t work = qkv.rows * qkv.cols * 8;  // an element moved counts as several products
  const int64_t step = work < kSerialWork ? qkv.rows : kAppendRows;
  parallel_for(step ? (qkv.rows + step - 1) / step : 0, [&](int64_t task) {
    for (int64_t i = task * step; i < std::min(qkv.rows, (task + 1) * step); ++i)
      kernel.append({qkv.row(i), cos.data ? cos.row(pos[i]) : nullptr,
                     sin.data ? sin.row(pos[i]) : nullptr,
                     cache.slab(seq[i], pos[i]) + cache.page_offset(layer, 0), shape.dtype,
                     int32_t(pos[i] % kPageTokens), heads.q, heads.kv, shape.dk, shape.dv});
  });
}

// --- attend -----------------------------------------------------------------------------------

// Some query vectors of one sequence and kv head, and the chunks of keys that they see.
struct Block {
  AttendTask task;
  float* out;
  int64_t first_chunk, chunks;
};

struct Plan {
  std::vector<Block> blocks;
  int64_t out_stride = 0;
  int32_t dv = 0;
  int64_t most_chunks = 0, most_vectors = 0;
  int64_t products = 0, bytes = 0;
  bool prefill = false;
};

int32_t vectors_per_block(int64_t all, int32_t dv) {
  // Few enough for every thread to have several blocks, and for two states each on the stack.
  const int64_t fitting = kStackFloats / (2 * state_floats(dv)) / kTileVectors * kTileVectors;
  const int64_t shared = (all / (4 * num_threads()) / kTileVectors + 1) * kTileVectors;
  return int32_t(std::min(fitting, shared));
}

void add_blocks(Plan& plan, AttendTask task, float* out, int32_t vectors, int32_t limit) {
  for (task.first = 0; task.first < vectors; task.first += limit) {
    task.count = std::min(limit, vectors - task.first);
    const int64_t oldest = int64_t(task.first_pos) + task.first / task.group;
    const int64_t newest = int64_t(task.first_pos) + (task.first + task.count - 1) / task.group;
    const int64_t low = task.window_left < 0 ? 0 : std::max<int64_t>(0, oldest - task.window_left);
    const int64_t first_chunk = low / kChunkTokens;
    const int64_t chunks = newest / kChunkTokens - first_chunk + 1;
    plan.blocks.push_back({task, out, first_chunk, chunks});
    plan.most_chunks = std::max(plan.most_chunks, chunks);
    plan.most_vectors = std::max<int64_t>(plan.most_vectors, task.count);
    plan.products += task.count * (newest + 1 - low) * (task.dk + task.dv);
  }
}

Plan plan_blocks(const Rows<float>& qkv, const KVCache& cache, int64_t layer, const int32_t* starts,
                 const int32_t* first_pos, float scale, int32_t window_left, const Rows<float>& out,
                 Heads heads) {
  const KVShape& shape = cache.shape();
  const int32_t group = heads.q / heads.kv;
  Plan plan;
  plan.out_stride = out.stride;
  plan.dv = shape.dv;
  const int32_t limit = vectors_per_block(qkv.rows * heads.q, shape.dv);
  for (int64_t b = 0; b < cache.batch(); ++b) {
    const int32_t rows = starts[b + 1] - starts[b];
    if (rows == 0) continue;
    plan.prefill |= rows > 1;
    for (int32_t h = 0; h < heads.kv; ++h) {
      const AttendTask task = {cache.slabs(b),
                               cache.page_offset(layer, h),
                               shape.dtype,
                               shape.dk,
                               shape.dv,
                               qkv.row(starts[b]) + int64_t(h) * group * shape.dk,
                               qkv.stride,
                               group,
                               first_pos[b],
                               0,
                               0,
                               window_left,
                               scale};
      add_blocks(plan, task, out.row(starts[b]) + int64_t(h) * group * shape.dv, rows * group,
                 limit);
    }
    const int64_t last = int64_t(first_pos[b]) + rows;
    const int64_t low = window_left < 0 ? 0 : std::max<int64_t>(0, first_pos[b] - window_left);
    plan.bytes +=
        (last - low) * heads.kv * page_bytes(shape.dtype, shape.dk, shape.dv) / kPageTokens;
  }
  plan.bytes += 4 * qkv.rows * (int64_t(heads.q) * shape.dk + out.cols);
  return plan;
}

// All chunks of a block in one task, states on the stack.
void run_block(const AttentionKernels& kernel, const Plan& plan, const Block& block) {
  alignas(BITNET_LINE) float states[kStackFloats];
  const int64_t size = state_floats(plan.dv) * block.task.count;
  kernel.chunk(block.task, block.first_chunk, states);
  for (int64_t c = 1; c < block.chunks; ++c) {
    kernel.chunk(block.task, block.first_chunk + c, states + size);
    kernel.merge(states, states + size, block.task.count, plan.dv);
  }
  kernel.finish(block.task, states, block.out, plan.out_stride);
}

// A task for each chunk, for decoding against a long context: states in `scratch`.
void run_split(const AttentionKernels& kernel, const Plan& plan, float* scratch) {
  const int64_t size = state_floats(plan.dv) * plan.most_vectors;
  const int64_t tasks = int64_t(plan.blocks.size()) * plan.most_chunks;
  parallel_for(tasks, [&](int64_t task) {
    const Block& block = plan.blocks[size_t(task / plan.most_chunks)];
    const int64_t c = task % plan.most_chunks;
    if (c < block.chunks) kernel.chunk(block.task, block.first_chunk + c, scratch + task * size);
  });
  for (const Block& block : plan.blocks) {
    for (int64_t c = 1; c < block.chunks; ++c)
      kernel.merge(scratch, scratch + c * size, block.task.count, plan.dv);
    kernel.finish(block.task, scratch, block.out, plan.out_stride);
    scratch += plan.most_chunks * size;
  }
}

float* split_scratch(const Plan& plan) {
  const int64_t blocks = int64_t(plan.blocks.size());
  if (plan.most_chunks < 2 || blocks >= 4 * num_threads()) return nullptr;
  const int64_t floats = blocks * plan.most_chunks * plan.most_vectors * state_floats(plan.dv);
  if (floats > kSplitFloats) return nullptr;
  try {
    return static_cast<float*>(thread_scratch(4 * floats));
  } catch (const std::bad_alloc&) {
    return nullptr;  // under a memory limit: whole blocks do without
  }
}

void run_plan(const AttentionKernels& kernel, const Plan& plan) {
  const int64_t blocks = int64_t(plan.blocks.size());
  if (plan.products < kSerialWork) {
    parallel_for(1, [&](int64_t) {
      for (const Block& block : plan.blocks) run_block(kernel, plan, block);
    });
  } else if (float* scratch = split_scratch(plan)) {
    run_split(kernel, plan, scratch);
  } else {
    parallel_for(blocks, [&](int64_t i) { run_block(kernel, plan, plan.blocks[size_t(i)]); });
  }
}

void check_rows(const KVCache& cache, const int32_t* starts, const int32_t* first_pos,
                int64_t rows) {
  const int64_t batch = cache.batch();
  if (starts[0] != 0 || starts[batch] != rows)
    raise_shape("starts: found " + text(starts[0]) + " to " + text(starts[batch]) +
                ", wanted 0 to " + text(rows));
  for (int64_t b = 0; b < batch; ++b) {
    if (starts[b + 1] < starts[b]) raise_shape("starts: found a decrease after " + text(b));
    const int64_t count = starts[b + 1] - starts[b];
    if (count > 0) bounded(first_pos[b], 0, cache.capacity(b) - count, "first_pos");
  }
}

void attend(const py::array& qkv_array, KVCache& cache, int64_t layer,
            const py::array& starts_array, const py::array& first_array, float scale,
            const py::array& out_array, int64_t window_left) {
  const Rows<float> qkv = rows_of<float>(qkv_array, "qkv");
  const Rows<float> out = rows_of<float>(out_array, "out", true);
  const KVShape& shape = cache.shape();
  const Heads heads = heads_of(qkv, shape, layer);
  if (out.rows != qkv.rows || out.cols != int64_t(heads.q) * shape.dv)
    raise_shape("out: found " + shape_text(out_array) + ", wanted [" + text(qkv.rows) + ", " +
                text(int64_t(heads.q) * shape.dv) + "]");
  bounded(window_left, -1, INT32_MAX, "window_left");
  const int32_t* starts = vector_of<int32_t>(starts_array, cache.batch() + 1, "starts");
  const int32_t* first_pos = vector_of<int32_t>(first_array, cache.batch(), "first_pos");
  const Claim claim(cache);
  check_rows(cache, starts, first_pos, qkv.rows);

  const AttentionKernels& kernel = *kernels().attention;
  py::gil_scoped_release unlocked;
  const Plan plan =
      plan_blocks(qkv, cache, layer, starts, first_pos, scale, int32_t(window_left), out, heads);
  const MetricsScope metrics(plan.prefill ? "attention_prefill" : "attention_decode", kernel.isa,
                             plan.bytes);
  run_plan(kernel, plan);
}

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<Lease>(m, "CacheLease")
      .def("__enter__", &Lease::enter)
      .def("__exit__", [](Lease& lease, const py::args&) { lease.exit(); });
  py::class_<KVCache, std::shared_ptr<KVCache>>(m, "KVCache")
      .def(py::init(&make_cache), py::arg("layers"), py::arg("batch"), py::arg("kv_heads"),
           py::arg("dk"), py::arg("dv"), py::arg("max_len"), py::arg("kv_dtype"))
      .def_property_readonly("lengths", &lengths)
      .def_property_readonly("nbytes", &KVCache::bytes_held)
      .def_property_readonly("nbytes_reserved", &KVCache::bytes_reserved)
      .def("reserve", &reserve, py::arg("total_lengths"))
      .def(
          "advance", [](KVCache& c, const py::array& n) { set_lengths(c, n, "counts", true); },
          py::arg("counts"))
      .def(
          "truncate", [](KVCache& c, const py::array& n) { set_lengths(c, n, "lengths", false); },
          py::arg("lengths"))
      .def("select", &select_rows, py::arg("rows"))
      .def("copy", &copy_cache)
      .def("lease", [](std::shared_ptr<KVCache> c) { return Lease(std::move(c)); });
  m.def("rope_append", &rope_append, py::arg("qkv"), py::arg("cos").none(true),
        py::arg("sin").none(true), py::arg("cache"), py::arg("layer"), py::arg("seq"),
        py::arg("pos"));
  m.def("attend", &attend, py::arg("qkv"), py::arg("cache"), py::arg("layer"), py::arg("starts"),
        py::arg("first_pos"), py::arg("scale"), py::arg("out"), py::arg("window_left") = -1);
}

}  // namespace bitnet
