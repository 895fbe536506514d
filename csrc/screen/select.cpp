#include "screen/select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/parallel_rows.h"
#include "dispatch/metrics.h"
#include "vocab/project.h"

namespace bitnet {
namespace {

constexpr int64_t kTaskElements = 131072;  // of a plane or the table, a task
// One stream over the table costs less than this part of its rows here and there.
constexpr int64_t kMostRows = 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The norm of x without its outliers, and the sum of |outliers|.  An element is an outlier where
// its share of the bound, 0.5 |x_e|, is less than what it adds to the other term: for errors spread
// evenly, sqrt(width / 12) (change of the norm).
void split(const float* x, int64_t width, double* rest, double* outliers) {
  double edge = kInfinity;
  for (int pass = 0; pass < 8; ++pass) {
    double squares = 0, out = 0;
    for (int64_t e = 0; e < width; ++e) {
      const double size = std::fabs(double(x[e]));
      if (size > edge)
        out += size;
      else
        squares += size * size;
    }
    const double norm = std::sqrt(squares), next = std::sqrt(12.0 / double(width)) * norm;
    const bool settled = out == *outliers && pass > 0;
    *rest = norm;
    *outliers = out;
    if (settled) return;
    edge = next;
  }
}

// Fills the query of x, its bytes into `pieces` [4 * row_bytes].  False where the bound does not
// hold: see screen.h.
bool make_query(const Screen& screen, const float* x, int8_t* pieces, ScreenQuery& q) {
  const ScreenTable& t = screen.table();
  const int64_t width = t.width, padded = 2 * t.row_bytes;
  double sum = 0, most = 0;
  for (int64_t e = 0; e < width; ++e) {
    const double size = std::fabs(double(x[e]));
    sum += size;
    most = std::max(most, size);
  }
  const double top = std::max(1.0, 127.5 * double(screen.largest_scale()));
  if (!(sum >= 0x1p-60 && sum * top <= 0x1p100)) return false;

  const double step = most / 32512;
  int8_t *coarse = pieces, *fine = pieces + padded;
  std::fill(pieces, pieces + 2 * padded, int8_t(0));
  int64_t coarse_sum = 0, fine_sum = 0, pieces_sum = 0;
  double left = 0;  // sum |x_e - t X_e|
  for (int64_t e = 0; e < width; ++e) {
    const int32_t value = int32_t(std::lrint(double(x[e]) / step));
    const int32_t b = ((value + 128) & 255) - 128, a = (value - b) / 256;
    coarse[e] = int8_t(a);
    fine[e] = int8_t(b);
    coarse_sum += a;
    fine_sum += b;
    pieces_sum += 256 * std::abs(a) + std::abs(b);
    left += std::fabs(double(x[e]) - step * value);
  }
  double rest = 0, outliers = 0;
  split(x, width, &rest, &outliers);
  const double chains = double((width + 15) / 16 + 8) * 0x1p-24 * (1 + 0x1p-10);
  const double both = 128 * left + chains * 127.5 * sum + 0x1p-20 * 160 * step * double(pieces_sum);
  const double raise = 1 + 0x1p-20;
  q.coarse = coarse;
  q.fine = fine;
  q.coarse_sum = int32_t(8 * coarse_sum);
  q.fine_sum = int32_t(8 * fine_sum);
  q.step = float(step);
  q.middle = float(7.5 / 16 * double(256 * coarse_sum + fine_sum));
  q.rest = float(rest * raise);
  q.slack_high = float((8.001 * outliers + both) * raise);
  q.slack_low = float((0.501 * outliers + both) * raise);
  q.floor = float(0x1p-100 * (1 + sum) * raise);
  return true;
}

// One row of x on its way.
struct Row {
  int64_t m;
  ScreenQuery query;
  ScreenBounds bounds;
  int32_t* rows;      // [V] those that may be among the largest
  int64_t count = 0;  // of them
};

class Selection {
 public:
  Selection(const VocabKernels& vocab, const ScreenKernels& kernels, const Screen& screen,
            const Projection& p, int64_t k, const int32_t* keep, const int64_t* starts)
      : vocab_(vocab),
        kernels_(kernels),
        screen_(screen),
        p_(p),
        k_(k),
        keep_(keep),
        starts_(starts),
        size_(screen.rows()) {}

  // Rows [begin, end) of x, at most kScreenRows.
  void run(int64_t begin, int64_t end) {
    const int64_t piece_bytes = 4 * screen_.table().row_bytes, lane = (size_ + 15) / 16 * 16;
    const int64_t key_bytes = k_ * (8 + 4 + 4);
    const int64_t row_bytes = 12 * lane + piece_bytes;
    char* memory =
        static_cast<char*>(call_scratch((end - begin) * row_bytes + (key_bytes + 63) / 64 * 64));
    keys_ = reinterpret_cast<uint64_t*>(memory + (end - begin) * row_bytes);
    Row rows[kScreenRows];
    int64_t count = 0;
    for (int64_t m = begin; m < end; ++m, memory += row_bytes) {
      Row& row = rows[count];
      float* floats = reinterpret_cast<float*>(memory + piece_bytes);
      row.m = m;
      row.bounds = {floats, floats + lane, p_.out + m * p_.out_stride};
      row.rows = reinterpret_cast<int32_t*>(floats + 2 * lane);
      row.count = 0;
      if (make_query(screen_, p_.x + m * p_.x_stride, reinterpret_cast<int8_t*>(memory), row.query))
        ++count;
      else
        failed_.push_back(m);
    }
    if (count > 0) screen(rows, count);
  }

  // The full product for the rows of x that want it, neighbours together.
  int64_t finish() {
    std::sort(failed_.begin(), failed_.end());
    for (size_t i = 0; i < failed_.size();) {
      size_t end = i + 1;
      while (end < failed_.size() && failed_[end] == failed_[end - 1] + 1) ++end;
      const Projection whole = rows_of(failed_[i], int64_t(end - i));
      const MetricsScope metrics("vocab_screen_fallback", vocab_.isa, size_ * table_row_bytes());
      project(vocab_, whole, size_);
      i = end;
    }
    return bytes_;
  }

 private:
  // The upper bounds live in the row of `out` until the logits take their place.
  void screen(Row* rows, int64_t count) {
    const ScreenTable& t = screen_.table();
    parallel_rows(size_, t.width, kTaskElements, [&](int64_t begin, int64_t end) {
      for (Row* row = rows; row < rows + count; ++row)
        kernels_.screen_high(t, row->query, p_.bias, begin, end, row->bounds);
    });
    bytes_ += size_ * (t.row_bytes + 12);
    for (Row* row = rows; row < rows + count; ++row) select(*row);
    refine(rows, count);
    for (Row* row = rows; row < rows + count; ++row) select(*row);
    compute(rows, count);
  }

  // Lists the rows whose upper bound reaches the k-th largest lower bound, and those to keep.
  void select(Row& row) {
    for (int64_t i = starts_[row.m]; i < starts_[row.m + 1]; ++i) {
      row.bounds.lower[keep_[i]] = -kInfinity;
      row.bounds.upper[keep_[i]] = kInfinity;
    }
    int32_t* ids = reinterpret_cast<int32_t*>(keys_ + k_);
    float* values = reinterpret_cast<float*>(ids + k_);
    vocab_.topk(row.bounds.lower, size_, k_, keys_, ids, values);
    row.count = kernels_.survivors(row.bounds.upper, size_, values[k_ - 1], row.rows);
  }

  // Bounds of the listed rows from both planes; the others are out.
  void refine(Row* rows, int64_t count) {
    const ScreenTable& t = screen_.table();
    for (Row* row = rows; row < rows + count; ++row) {
      std::fill_n(row->bounds.lower, size_, -kInfinity);
      std::fill_n(row->bounds.upper, size_, -kInfinity);
      bytes_ += row->count * 16;
    }
    each_listed(rows, count, t.row_bytes, [&](const Row& row, const int32_t* ids, int64_t n) {
      kernels_.screen_low(t, row.query, p_.bias, ids, n, row.bounds);
    });
  }

  // The logits of the listed rows, where they are few.
  void compute(Row* rows, int64_t count) {
    for (Row* row = rows; row < rows + count; ++row) {
      if (row->count > size_ / kMostRows) {
        failed_.push_back(row->m);
        row->count = 0;
      } else {
        std::fill_n(rows_of(row->m, 1).out, size_, -kInfinity);
      }
    }
    each_listed(rows, count, table_row_bytes(), [&](const Row& row, const int32_t* ids, int64_t n) {
      const Projection one = rows_of(row.m, 1);
      for (int64_t i = 0; i < n; ++i) vocab_.project_few(one, ids[i], ids[i] + 1);
    });
  }

  // use(row, ids, n) for the ids that each row lists, in parallel: ids of one part of the table by
  // one task, so that rows which want the same ones read them from the cache.
  template <class Use>
  void each_listed(const Row* rows, int64_t count, int64_t row_bytes, Use use) {
    int64_t most = 0;
    for (const Row* row = rows; row < rows + count; ++row) most = std::max(most, row->count);
    const int64_t tasks = std::clamp<int64_t>(most / 8, 1, (size_ + 63) / 64);
    parallel_for(tasks, [&](int64_t task) {
      for (const Row* row = rows; row < rows + count; ++row) {
        const int32_t *ids = row->rows, *end = ids + row->count;
        const int32_t* first = std::lower_bound(ids, end, size_ * task / tasks);
        const int32_t* last = std::lower_bound(first, end, size_ * (task + 1) / tasks);
        if (first < last) use(*row, first, last - first);
      }
    });
    bytes_ += most * row_bytes;  // at least: the rows of x may list others
  }

  int64_t table_row_bytes() const { return p_.width * (p_.dtype == Dtype::f32 ? 4 : 2); }

  Projection rows_of(int64_t m, int64_t rows) const {
    Projection part = p_;
    part.x += m * p_.x_stride;
    part.out += m * p_.out_stride;
    part.rows = rows;
    return part;
  }

  const VocabKernels& vocab_;
  const ScreenKernels& kernels_;
  const Screen& screen_;
  const Projection& p_;
  const int64_t k_;
  const int32_t* keep_;
  const int64_t* starts_;
  const int64_t size_;
  uint64_t* keys_ = nullptr;     // [k], then ids [k] and values [k]
  std::vector<int64_t> failed_;  // rows of x
  int64_t bytes_ = 0;
};

int64_t plane_bytes(int64_t rows, int64_t width) { return rows * screen_row_bytes(width); }

}  // namespace

int64_t Screen::bytes(int64_t rows, int64_t width) {
  return 2 * plane_bytes(rows, width) + 12 * rows;
}

Screen::Screen(const ScreenKernels& kernels, const void* data, Dtype dtype, int64_t stride,
               int64_t rows, int64_t width)
    : rows_(rows),
      planes_(size_t(2 * plane_bytes(rows, width))),
      floats_(size_t(3 * rows) * sizeof(float)) {
  uint8_t* planes = static_cast<uint8_t*>(planes_.data());
  float* floats = static_cast<float*>(floats_.data());
  table_ = {planes,
            planes + plane_bytes(rows, width),
            floats,
            floats + rows,
            floats + 2 * rows,
            width,
            screen_row_bytes(width)};
  parallel_rows(rows, width, kTaskElements, [&](int64_t begin, int64_t end) {
    kernels.pack(data, dtype, stride, table_, begin, end);
  });
  for (int64_t v = 0; v < rows; ++v) {
    finite_ = finite_ && std::isfinite(table_.scale[v]);
    largest_scale_ = std::max(largest_scale_, table_.scale[v]);
  }
}

bool screen_bounds(const ScreenKernels& kernels, const Screen& screen, const float* x,
                   const float* bias, float* out) {
  const int64_t rows = screen.rows();
  std::vector<int8_t> pieces(size_t(4 * screen.table().row_bytes));
  std::vector<float> high(static_cast<size_t>(rows));
  std::vector<int32_t> ids(static_cast<size_t>(rows));
  std::iota(ids.begin(), ids.end(), 0);
  ScreenQuery q;
  if (!make_query(screen, x, pieces.data(), q)) return false;
  const ScreenTable& t = screen.table();
  kernels.screen_high(t, q, bias, 0, rows, {high.data(), out, out + rows});
  kernels.screen_low(t, q, bias, ids.data(), rows, {high.data(), out + 2 * rows, out + 3 * rows});
  return true;
}

int64_t project_top(const VocabKernels& vocab, const ScreenKernels& kernels, const Screen& screen,
                    const Projection& p, int64_t k, const int32_t* keep, const int64_t* starts) {
  Selection selection(vocab, kernels, screen, p, k, keep, starts);
  for (int64_t m = 0; m < p.rows; m += kScreenRows)
    selection.run(m, std::min(p.rows, m + kScreenRows));
  return selection.finish();
}

}  // namespace bitnet
