// A screen in memory, and the largest logits through it.
#pragma once
#include <atomic>

#include "base/arena.h"
#include "screen/screen.h"
#include "vocab/vocab.h"

namespace bitnet {

// The int8 copy of a table of `rows` rows, in counted memory.
class Screen {
 public:
  // Copies on all threads. Throws std::bad_alloc.
  Screen(const ScreenKernels& kernels, const void* data, Dtype dtype, int64_t stride, int64_t rows,
         int64_t width);
  static int64_t bytes(int64_t rows, int64_t width);
  int64_t nbytes() const { return int64_t(planes_.bytes() + floats_.bytes()); }
  // Whether every value of the table is finite; else no bound is known.
  bool finite() const { return finite_; }
  const ScreenTable& table() const { return table_; }
  int64_t rows() const { return rows_; }
  float largest_scale() const { return largest_scale_; }

  // How many planes to read at first: one, or two at once where lately one alone left a
  // quarter of the rows.
  // Both ways lead to the same logits.
  int first_planes() const;
  void learn(int64_t survivors) const;  // of one plane

 private:
  int64_t rows_;
  Buffer planes_, floats_;
  ScreenTable table_ = {};
  float largest_scale_ = 0;
  bool finite_ = true;
  mutable std::atomic<bool> four_bits_{true};
  mutable std::atomic<uint32_t> calls_{0};
};

// The bounds of every logit of x [width], bias [V] or null, from one, two and three planes: out
// [3][2][V] are lower and upper.  False where no bound is known for this x.
bool screen_bounds(const ScreenKernels& kernels, const Screen& screen, const float* x,
                   const float* bias, float* out);

// Rows of x that are screened in one pass over the copy.
constexpr int64_t kScreenRows = 8;

// out[m][v] of projection p, the bits of the full product, for the k largest logits of each row m
// (all that equal the k-th too) and the ids keep[starts[m] .. starts[m + 1]), which count for none
// of the k. The others are -inf: the same whatever planes were read, and where the full product was
// needed or no dearer.  Returns the bytes read, but those of full products.
int64_t project_top(const VocabKernels& vocab, const ScreenKernels& kernels, const Screen& screen,
                    const Projection& p, int64_t k, const int32_t* keep, const int64_t* starts);

}  // namespace bitnet
