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
constexpr int64_t kPieceBytes = 1 << 16;   // of a plane or the table that a task's listed rows have
// One stream over the table costs less than this part of its rows here and there.
constexpr int64_t kMostRows = 4;
constexpr uint32_t kTryAgain = 32;
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

// Fills the query of x, its bytes into `pieces` [2 * screen_width].  False where the bound does not
// hold: see screen.h.
bool make_query(const Screen& screen, const float* x, int8_t* pieces, ScreenQuery& q) {
  const int64_t width = screen.table().width, padded = screen_width(width);
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
  const double both = 128 * left + chains * 127.5 * sum + 0x1p-19 * 160 * step * double(pieces_sum);
  const double raise = 1 + 0x1p-20;
  q.coarse = coarse;
  q.fine = fine;
  q.coarse_sum = int32_t(8 * coarse_sum);
  q.fine_sum = int32_t(8 * fine_sum);
  q.step = float(step);
  q.rest = float(rest * raise);
  const double unknown[kPlanes] = {7.5 / 16, 1.5 / 4, 0}, most_off[kPlanes] = {8.001, 2.001, 0.501};
  for (int plane = 0; plane < kPlanes; ++plane) {
    q.centre[plane] = float(unknown[plane] * double(256 * coarse_sum + fine_sum));
    q.slack[plane] = float((most_off[plane] * outliers + both) * raise);
  }
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
    const int64_t piece_bytes = 2 * screen_width(screen_.table().width),
                  lane = (size_ + 15) / 16 * 16;
    const int64_t row_bytes = 12 * lane + piece_bytes;
    char* memory = static_cast<char*>(call_scratch((end - begin) * row_bytes + key_bytes()));
    keys_ = reinterpret_cast<uint64_t*>(memory + (end - begin) * row_bytes);
    Row rows[kScreenRows];
    int64_t count = 0;
    for (int64_t m = begin; m < end; ++m, memory += row_bytes) {
      Row& row = rows[count];
      float* floats = reinterpret_cast<float*>(memory + piece_bytes);
      row.m = m;
      row.bounds = {floats, floats + lane, p_.out_row(m)};
      row.rows = reinterpret_cast<int32_t*>(floats + 2 * lane);
      row.count = 0;
      if (make_query(screen_, p_.x + m * p_.x_stride, reinterpret_cast<int8_t*>(memory), row.query))
        ++count;
      else
        failed_.push_back(m);
    }
    if (count > 0) screen(rows, count);
  }

  // The full product for the rows of x that want it, neighbours together; and of every row no more
  // than was asked for, so that the result is the same whatever planes were read.
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
    keys_ = static_cast<uint64_t*>(call_scratch(key_bytes()));
    for (int64_t m = 0; m < p_.rows; ++m) trim(p_.out_row(m), m);
    return bytes_;
  }

 private:
  // The upper bounds live in the row of `out` until the logits take their place.
  void screen(Row* rows, int64_t count) {
    const ScreenTable& t = screen_.table();
    const int first = screen_.first_planes();
    parallel_rows(size_, t.width, kTaskElements, [&](int64_t begin, int64_t end) {
      for (Row* row = rows; row < rows + count; ++row)
        kernels_.screen_all(t, row->query, p_.bias, first, begin, end, row->bounds);
    });
    bytes_ += size_ * 12;
    for (int plane = 0; plane < first; ++plane) bytes_ += size_ * screen_row_bytes(t.width, plane);
    for (int plane = first; plane < kPlanes; ++plane) {
      for (Row* row = rows; row < rows + count; ++row) select(*row);
      if (plane == 1) screen_.learn(rows[0].count);
      refine(rows, count, plane);
    }
    for (Row* row = rows; row < rows + count; ++row) select(*row);
    compute(rows, count);
  }

  // Lists the rows whose upper bound reaches what k logits reach, and those to keep.
  void select(Row& row) {
    for (int64_t i = starts_[row.m]; i < starts_[row.m + 1]; ++i) {
      row.bounds.lower[keep_[i]] = -kInfinity;
      row.bounds.upper[keep_[i]] = kInfinity;
    }
    row.count = kernels_.survivors(row.bounds.upper, size_, reached(row), row.rows);
  }

  // The least of the k logits whose lower bounds are the largest, computed. Their estimates are far
  // better than the bounds say: of a random table's 128,256 rows, six bits leave some 1,400 that
  // reach it, and 19,862 that reach the k-th lower bound.
  float reached(Row& row) {
    const float bound = kth(row.bounds.lower);
    // Of so many the whole table is read in the end.
    if (bound == -kInfinity || k_ > size_ / kMostRows) return bound;
    std::sort(ids(), ids() + k_);
    std::copy_n(ids(), k_, row.rows);
    row.count = k_;
    logits(&row, 1);  // in the place of their upper bounds
    float least = kInfinity;
    for (int64_t i = 0; i < k_; ++i) {
      const float logit = row.bounds.upper[row.rows[i]];
      if (!(logit >= least)) least = logit;  // NaN lists every row
    }
    return least;
  }

  // Bounds of the listed rows from one more plane; the others are out.
  void refine(Row* rows, int64_t count, int plane) {
    const ScreenTable& t = screen_.table();
    for (Row* row = rows; row < rows + count; ++row) {
      std::fill_n(row->bounds.lower, size_, -kInfinity);
      std::fill_n(row->bounds.upper, size_, -kInfinity);
      bytes_ += row->count * 16;
    }
    const int64_t row_bytes = screen_row_bytes(t.width, plane);
    each_listed(rows, count, row_bytes, [&](const Row& row, const int32_t* ids, int64_t n) {
      kernels_.screen_listed(t, row.query, p_.bias, plane, ids, n, row.bounds);
    });
  }

  // The logits of the listed rows, where they are few.
  void compute(Row* rows, int64_t count) {
    for (Row* row = rows; row < rows + count; ++row) {
      if (row->count > size_ / kMostRows) {
        failed_.push_back(row->m);
        row->count = 0;
      } else {
        std::fill_n(p_.out_row(row->m), size_, -kInfinity);
      }
    }
    logits(rows, count);
  }

  // Of the rows that are listed.
  void logits(const Row* rows, int64_t count) {
    each_listed(rows, count, table_row_bytes(), [&](const Row& row, const int32_t* ids, int64_t n) {
      const Projection one = rows_of(row.m, 1);
      for (int64_t i = 0; i < n; ++i) vocab_.project(one, ids[i], ids[i] + 1);
    });
  }

  // use(row, ids, n) for the ids that each row lists, in parallel: ids of one part of the table by
  // one task, so that rows which want the same ones read them from the cache.
  template <class Use>
  void each_listed(const Row* rows, int64_t count, int64_t row_bytes, Use use) {
    int64_t most = 0;
    for (const Row* row = rows; row < rows + count; ++row) most = std::max(most, row->count);
    // A few rows take less time than the other threads need to wake.
    const int64_t tasks = std::max<int64_t>(1, most * row_bytes / kPieceBytes);
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

  // What is below the k-th largest, but for the ids to keep, becomes -inf.
  void trim(float* logits, int64_t m) {
    kept_.clear();
    for (int64_t i = starts_[m]; i < starts_[m + 1]; ++i) kept_.push_back(logits[keep_[i]]);
    for (int64_t i = starts_[m]; i < starts_[m + 1]; ++i) logits[keep_[i]] = -kInfinity;
    const float least = kth(logits);
    for (int64_t v = 0; v < size_; ++v) logits[v] = logits[v] < least ? -kInfinity : logits[v];
    for (int64_t i = starts_[m]; i < starts_[m + 1]; ++i)
      logits[keep_[i]] = kept_[size_t(i - starts_[m])];
  }

  // The k-th largest of values [V]; where they are, in ids().
  float kth(const float* values) const {
    float* largest = reinterpret_cast<float*>(ids() + k_);
    vocab_.topk(values, size_, k_, keys_, ids(), largest);
    return largest[k_ - 1];
  }
  int32_t* ids() const { return reinterpret_cast<int32_t*>(keys_ + k_); }
  int64_t key_bytes() const { return (k_ * (8 + 4 + 4) + 63) / 64 * 64; }

  int64_t table_row_bytes() const { return p_.width * (p_.dtype == Dtype::f32 ? 4 : 2); }

  Projection rows_of(int64_t m, int64_t rows) const {
    Projection part = p_;
    part.x += m * p_.x_stride;
    if (p_.places)
      part.places += m;
    else
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
  std::vector<float> kept_;      // logits to keep
  int64_t bytes_ = 0;
};

}  // namespace

// All bits of a code, a scale and an error for each plane.
int64_t Screen::bytes(int64_t rows, int64_t width) {
  return rows * (screen_width(width) + (1 + kPlanes) * int64_t(sizeof(float)));
}

Screen::Screen(const ScreenKernels& kernels, const void* data, Dtype dtype, int64_t stride,
               int64_t rows, int64_t width)
    : rows_(rows),
      planes_(size_t(rows * screen_width(width))),
      floats_(size_t((1 + kPlanes) * rows) * sizeof(float)) {
  uint8_t* plane = static_cast<uint8_t*>(planes_.data());
  float* floats = static_cast<float*>(floats_.data());
  table_.width = width;
  table_.scale = floats;
  for (int p = 0; p < kPlanes; ++p) {
    table_.plane[p] = plane;
    table_.error[p] = floats += rows;
    plane += rows * screen_row_bytes(width, p);
  }
  parallel_rows(rows, width, kTaskElements, [&](int64_t begin, int64_t end) {
    kernels.pack(data, dtype, stride, table_, begin, end);
  });
  for (int64_t v = 0; v < rows; ++v) {
    finite_ = finite_ && std::isfinite(table_.scale[v]);
    largest_scale_ = std::max(largest_scale_, table_.scale[v]);
  }
}

void Screen::learn(int64_t survivors) const {
  four_bits_.store(survivors < rows_ / 4, std::memory_order_relaxed);
}

int Screen::first_planes() const {
  // While four bits do not do, they are tried now and then.
  const bool four = four_bits_.load(std::memory_order_relaxed) ||
                    calls_.fetch_add(1, std::memory_order_relaxed) % kTryAgain == kTryAgain - 1;
  return four ? 1 : 2;
}

bool screen_bounds(const ScreenKernels& kernels, const Screen& screen, const float* x,
                   const float* bias, float* out) {
  const int64_t rows = screen.rows();
  const ScreenTable& t = screen.table();
  std::vector<int8_t> pieces(size_t(2 * screen_width(t.width)));
  std::vector<float> sum(static_cast<size_t>(rows));
  std::vector<int32_t> ids(static_cast<size_t>(rows));
  std::iota(ids.begin(), ids.end(), 0);
  ScreenQuery q;
  if (!make_query(screen, x, pieces.data(), q)) return false;
  kernels.screen_all(t, q, bias, 1, 0, rows, {sum.data(), out, out + rows});
  for (int plane = 1; plane < kPlanes; ++plane) {
    out += 2 * rows;
    kernels.screen_listed(t, q, bias, plane, ids.data(), rows, {sum.data(), out, out + rows});
  }
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
