// Ternary matrices as files store them -> panels (ternary.h), and back.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "ternary/product.h"

namespace bitnet {

// What a stored matrix contradicts; the message names it, the value found and the value wanted.
struct PackError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class SourceKind {
  codes,       // int8 [n, k] of -1, 0, 1
  hf,          // uint8 [n / 4, k]: row r of quarter i of the rows at bits 2i
  tq1_0,       // 54 bytes for 256 weights: base-3 digits
  tq2_0,       // 66 bytes for 256 weights
  i2_s,        // groups of 128 weights in 32 bytes
  i2_s_arm,    // groups of 64 weights in 16 bytes
  i2_s_rows4,  // byte r * k + c: rows 4r .. 4r + 3 of column c
  f32,         // latent weights, quantised by their absolute mean
  f16,
  bf16,
};

struct TernarySource {
  std::string name;
  SourceKind kind;
  const uint8_t* data;
  int64_t n, k;
  float scale;  // positive; latent weights bring their own
  bool divide;
  const int32_t* row_order;  // [n]: row i is row row_order[i] of the data; null: i
};

bool is_latent(SourceKind kind);
// Bytes of data of an n x k matrix; PackError where the kind cannot hold that shape.
int64_t source_bytes(const TernarySource& source);

// Scale of a latent matrix: s = 1 / max(mean |w|, 1e-5).  PackError where a weight is not finite.
float latent_inverse_scale(const TernarySource& source);

// Longest run of k that fetch_codes takes; runs start at multiples of it, so at whole blocks of
// every stored form and of both layouts.
inline constexpr int64_t kFetch = 1280;

// Codes w + 1 of `count` weights of data row `row` from column k0 on.  A stored value that is no
// ternary weight comes out above 2.  `s`: latent_inverse_scale, for latent kinds.
void fetch_codes(const TernarySource& source, float s, int64_t row, int64_t k0, int64_t count,
                 uint8_t* codes);

// The rows of all sources, one below the other, packed by all threads.  PackError leaves nothing.
TernaryMatrix ternary_pack(const std::vector<TernarySource>& sources, int32_t quads);

}  // namespace bitnet
