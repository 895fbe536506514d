#include "ternary/pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "base/threads.h"

namespace bitnet {
namespace {

// Codes of one output, `count` columns (a multiple of the block), into its bytes of the blocks.
void put2(const uint8_t* codes, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i += 16, to += kBlockBytes) {
    uint32_t quad[4];
    std::memcpy(quad, codes + i, 16);
    const uint32_t packed = quad[0] | quad[1] << 2 | quad[2] << 4 | quad[3] << 6;
    std::memcpy(to, &packed, 4);
  }
}

// ceil(256 d / 243) of every d of five base-3 digits.
struct DigitTable {
  uint8_t byte[243];
  constexpr DigitTable() : byte() {
    for (int d = 0; d < 243; ++d) byte[d] = uint8_t((256 * d + 242) / 243);
  }
};
constexpr DigitTable kDigits;

void put5(const uint8_t* codes, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i += 20, to += kBlockBytes)
    for (int j = 0; j < 4; ++j) {
      int d = 0;
      for (int t = 0; t < 5; ++t) d = 3 * d + codes[i + 4 * t + j];
      to[j] = kDigits.byte[d];
    }
}

// Where a panel's outputs come from: (source, row of its data), nothing past the last output.
struct Rows {
  explicit Rows(const std::vector<TernarySource>& all) : sources(all) {
    for (const TernarySource& s : all) ends.push_back((ends.empty() ? 0 : ends.back()) + s.n);
  }
  size_t source_of(int64_t row) const {
    return size_t(std::upper_bound(ends.begin(), ends.end(), row) - ends.begin());
  }
  int64_t data_row(size_t source, int64_t row) const {
    const int64_t own = row - (ends[source] - sources[source].n);
    return sources[source].row_order ? sources[source].row_order[own] : own;
  }
  const std::vector<TernarySource>& sources;
  std::vector<int64_t> ends;
};

// Fills one panel; the first row that holds a value which is no ternary weight, or -1.
int64_t pack_panel(const Rows& rows, const std::vector<float>& inverse, TernaryMatrix& w,
                   int64_t panel) {
  int64_t bad = -1;
  uint8_t codes[kFetch];
  for (int64_t k0 = 0; k0 < w.blocks * w.block_k(); k0 += kFetch) {
    const int64_t padded = std::min(kFetch, w.blocks * w.block_k() - k0);
    const int64_t count = std::clamp<int64_t>(w.k - k0, 0, padded);
    uint8_t* block = w.panel(panel) + k0 / w.block_k() * kBlockBytes;
    for (int64_t o = 0; o < kPanel; ++o) {
      const int64_t row = panel * kPanel + o;
      std::memset(codes, 1, size_t(padded));
      if (row < w.n) {
        const size_t i = rows.source_of(row);
        fetch_codes(rows.sources[i], inverse[i], rows.data_row(i, row), k0, count, codes);
        uint8_t most = 0;
        for (int64_t j = 0; j < count; ++j) most = std::max(most, codes[j]);
        if (most > 2) {
          bad = bad < 0 ? row : std::min(bad, row);
          continue;
        }
      }
      (w.quads == 4 ? put2 : put5)(codes, padded, block + o * 4);
    }
  }
  return bad;
}

[[noreturn]] void refuse_row(const TernarySource& source, int64_t row) {
  const bool codes = source.kind == SourceKind::codes;
  throw PackError(source.name + ": found " +
                  (codes ? "a weight other than -1, 0 and 1" : "a 2-bit field of 3") + " in row " +
                  std::to_string(row) + (codes ? "" : ", wanted 0, 1 or 2 for -1, 0 and 1"));
}

void check(const std::vector<TernarySource>& sources) {
  for (const TernarySource& s : sources) {
    if (s.k > kTernaryMaxK)
      throw PackError(s.name + ": found " + std::to_string(s.k) + " columns, wanted at most " +
                      std::to_string(int(kTernaryMaxK)));
    if (s.k != sources[0].k)
      throw PackError(s.name + ": found " + std::to_string(s.k) + " columns, wanted " +
                      std::to_string(sources[0].k) + " as in " + sources[0].name);
    if (s.divide != sources[0].divide)
      throw PackError(s.name + ": its scale " + (s.divide ? "divides" : "multiplies") +
                      " and that of " + sources[0].name + " does not, wanted one rule");
    if (!is_latent(s.kind) && !(s.scale > 0 && std::isfinite(s.scale)))
      throw PackError(s.name + ": found a scale of " + std::to_string(s.scale) +
                      ", wanted a positive number");
    for (int64_t i = 0; s.row_order && i < s.n; ++i)
      if (s.row_order[i] < 0 || s.row_order[i] >= s.n)
        throw PackError(s.name + ": found row " + std::to_string(s.row_order[i]) +
                        " in row_order, wanted 0 to " + std::to_string(s.n - 1));
  }
}

void unpack_block(const TernaryMatrix& w, const uint8_t* block,
                  int8_t* weights /* [64][block_k] */) {
  for (int i = 0; i < kBlockBytes; ++i) {
    int8_t* to = weights + i / 4 * w.block_k() + i % 4;
    unsigned r = block[i];
    for (int t = 0; t < w.quads; ++t)
      if (w.quads == 4) {
        to[4 * t] = int8_t(int(r >> 2 * t & 3) - 1);
      } else {
        to[4 * t] = int8_t(int(3 * r >> 8) - 1);
        r = 3 * r & 255;
      }
  }
}

}  // namespace

TernaryMatrix ternary_pack(const std::vector<TernarySource>& sources, int32_t quads) {
  check(sources);
  const Rows rows(sources);
  TernaryMatrix w(rows.ends.back(), sources[0].k, quads);
  w.divide = sources[0].divide;
  std::vector<float> inverse;
  for (size_t i = 0; i < sources.size(); ++i) {
    const TernarySource& s = sources[i];
    inverse.push_back(is_latent(s.kind) ? latent_inverse_scale(s) : 0);
    // A latent weight is code / s, so its scale multiplies by 1 / s or divides by s.
    const float scale = !is_latent(s.kind) ? s.scale : s.divide ? inverse[i] : 1.0f / inverse[i];
    std::fill(w.scales() + rows.ends[i] - s.n, w.scales() + rows.ends[i], scale);
  }
  for (int64_t n = 1; n < w.n; ++n)
    w.uniform_scale = w.uniform_scale && w.scales()[n] == w.scales()[0];

  std::atomic<int64_t> first_bad{w.n};
  parallel_for(w.panel_count(), [&](int64_t panel) {
    const int64_t bad = pack_panel(rows, inverse, w, panel);
    for (int64_t seen = first_bad.load(); bad >= 0 && bad < seen;)
      if (first_bad.compare_exchange_weak(seen, bad)) break;
  });
  if (const int64_t bad = first_bad.load(); bad < w.n) {
    const size_t i = rows.source_of(bad);
    refuse_row(sources[i], rows.data_row(i, bad));
  }
  return w;
}

void ternary_unpack(const TernaryMatrix& w, int8_t* out) {
  parallel_for(w.panel_count(), [&](int64_t panel) {
    int8_t weights[kPanel * 20];
    const int64_t rows = std::min<int64_t>(kPanel, w.n - panel * kPanel);
    for (int64_t b = 0; b < w.blocks; ++b) {
      unpack_block(w, w.panel(panel) + b * kBlockBytes, weights);
      const int64_t k0 = b * w.block_k(), count = std::min(w.block_k(), w.k - k0);
      for (int64_t o = 0; o < rows && count > 0; ++o)
        std::memcpy(out + (panel * kPanel + o) * w.k + k0, weights + o * w.block_k(),
                    size_t(count));
    }
  });
}

}  // namespace bitnet
