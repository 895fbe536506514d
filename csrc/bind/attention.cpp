// KVCache, rope_append and attend: arguments checked.
#include "bind/cached.h"

namespace bitnet {
namespace {

// --- the cache --------------------------------------------------------------------------------

Dtype kv_dtype(const std::string& name) {
  if (name == "f32") return Dtype::f32;
  if (name == "f16") return Dtype::f16;
  if (name == "int8") return Dtype::i8;
  raise_shape("kv_dtype: found '" + name + "', wanted f32, f16 or int8");
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

// --- calls ------------------------------------------------------------------------------------

Rows<float> rope_table(const py::object& table, int64_t cols, const char* name) {
  if (table.is_none()) return {};
  const Rows<float> rows = rows_of<float>(py::reinterpret_borrow<py::array>(table), name);
  if (rows.cols != cols)
    raise_shape(std::string(name) + ": found rows of " + text(rows.cols) + ", wanted " +
                text(cols));
  return rows;
}

void rope_append(const py::array& qkv_array, const py::object& cos, const py::object& sin,
                 KVCache& cache, int64_t layer, const py::array& seq, const py::array& pos) {
  const Rows<float> qkv = rows_of<float>(qkv_array, "qkv", true);
  const RopeRows rope = rope_rows_of(cos, sin, cache.shape().dk);
  const Claim claim(cache);
  const AppendCall call = append_call(qkv, rope, cache, layer, seq, pos);
  py::gil_scoped_release unlocked;
  run_append(call);
}

void attend(const py::array& qkv_array, KVCache& cache, int64_t layer, const py::array& starts,
            const py::array& first_pos, float scale, const py::array& out_array,
            int64_t window_left) {
  const Rows<float> qkv = rows_of<float>(qkv_array, "qkv");
  const Rows<float> out = rows_of<float>(out_array, "out", true);
  const Claim claim(cache);
  const AttendCall call =
      attend_call(qkv, cache, layer, starts, first_pos, scale, window_left, out);
  py::gil_scoped_release unlocked;
  run_attend(call);
}

}  // namespace

Claim::Claim(KVCache& cache) : KVCacheUse(cache, false) {
  if (refused()) raise_in_use();
}

HeadCounts heads_of(int64_t cols, const KVCache& cache, int64_t layer) {
  const KVShape& shape = cache.shape();
  bounded(layer, 0, shape.layers - 1, "layer");
  const int64_t rest = cols - shape.kv_heads * (int64_t(shape.dk) + shape.dv);
  if (rest <= 0 || rest % (shape.kv_heads * shape.dk) != 0)
    raise_shape("qkv: found rows of " + text(cols) + ", wanted q_heads * " + text(shape.dk) +
                " + " + text(shape.kv_heads) + " * (" + text(shape.dk) + " + " + text(shape.dv) +
                ") with q_heads a multiple of " + text(shape.kv_heads));
  return {int32_t(rest / shape.dk), int32_t(shape.kv_heads)};
}

RopeRows rope_rows_of(const py::object& cos_table, const py::object& sin_table, int32_t dk) {
  const Rows<float> cos = rope_table(cos_table, dk / 2, "cos");
  const Rows<float> sin = rope_table(sin_table, dk / 2, "sin");
  if (!cos.data != !sin.data || cos.rows != sin.rows || (cos.data && dk % 2 != 0))
    raise_shape("cos, sin: found different shapes or an odd dk, wanted two tables of [P, dk / 2]");
  return {cos, sin};
}

AppendCall append_call(const Rows<float>& qkv, const RopeRows& rope, const KVCache& cache,
                       int64_t layer, const py::array& seq_array, const py::array& pos_array) {
  const HeadCounts heads = heads_of(qkv.cols, cache, layer);
  const int32_t* seq = vector_of<int32_t>(seq_array, qkv.rows, "seq");
  const int32_t* pos = vector_of<int32_t>(pos_array, qkv.rows, "pos");
  for (int64_t i = 0; i < qkv.rows; ++i) {
    bounded(seq[i], 0, cache.batch() - 1, "seq");
    bounded(pos[i], cache.length(seq[i]), cache.capacity(seq[i]) - 1, "pos");
    if (rope.cos.data) bounded(pos[i], 0, rope.cos.rows - 1, "pos (rows of cos)");
  }
  return {qkv, heads, rope, &cache, layer, seq, pos};
}

AttendCall attend_call(const Rows<float>& qkv, const KVCache& cache, int64_t layer,
                       const py::array& starts_array, const py::array& first_array, float scale,
                       int64_t window_left, const Rows<float>& out) {
  const HeadCounts heads = heads_of(qkv.cols, cache, layer);
  const int64_t width = int64_t(heads.q) * cache.shape().dv, batch = cache.batch();
  if (out.rows != qkv.rows || out.cols != width)
    raise_shape("out: found [" + text(out.rows) + ", " + text(out.cols) + "], wanted [" +
                text(qkv.rows) + ", " + text(width) + "]");
  bounded(window_left, -1, INT32_MAX, "window_left");
  const int32_t* starts = vector_of<int32_t>(starts_array, batch + 1, "starts");
  const int32_t* first = vector_of<int32_t>(first_array, batch, "first_pos");
  if (starts[0] != 0 || starts[batch] != qkv.rows)
    raise_shape("starts: found " + text(starts[0]) + " to " + text(starts[batch]) +
                ", wanted 0 to " + text(qkv.rows));
  bool prefill = false;
  for (int64_t b = 0; b < batch; ++b) {
    if (starts[b + 1] < starts[b]) raise_shape("starts: found a decrease after " + text(b));
    const int64_t count = starts[b + 1] - starts[b];
    prefill |= count > 1;
    if (count > 0) bounded(first[b], 0, cache.capacity(b) - count, "first_pos");
  }
  return {qkv, heads, &cache, layer, starts, first, scale, int32_t(window_left), out, prefill};
}

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
