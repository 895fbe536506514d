// Stored forms of ternary matrices, a row of codes at a time.  Their formulas are in SourceKind's
// comments; the loops are plain so that the compiler vectorises them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/threads.h"
#include "ternary/pack.h"

namespace bitnet {
namespace {

constexpr int64_t kTqWeights = 256, kTq1Bytes = 54, kTq2Bytes = 66;

void shift_fields(const uint8_t* bytes, int shift, int64_t count, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = bytes[i] >> shift & 3;
}

// Flat index 4 * group * b + group * g + p -> byte group * b + p, bits 6 - 2g.
void fetch_groups(const uint8_t* data, int64_t flat, int64_t group, int64_t count, uint8_t* codes) {
  while (count > 0) {
    const int64_t in_block = flat % (4 * group), g = in_block / group, p = in_block % group;
    const int64_t run = std::min(count, group - p);
    shift_fields(data + flat / (4 * group) * group + p, int(6 - 2 * g), run, codes);
    flat += run, codes += run, count -= run;
  }
}

void fetch_tq2(const uint8_t* block, uint8_t* codes) {
  for (int j = 0; j < 2; ++j)
    for (int l = 0; l < 4; ++l) shift_fields(block + 32 * j, 2 * l, 32, codes + 128 * j + 32 * l);
}

// Digit i of a byte is floor(3 r / 256) with r = byte * 3^i mod 256.
void digits(const uint8_t* bytes, int64_t count, int trits, uint8_t* codes) {
  unsigned power = 1;
  for (int i = 0; i < trits; ++i, power *= 3)
    for (int64_t m = 0; m < count; ++m)
      codes[i * count + m] = uint8_t(((bytes[m] * power & 255) * 3) >> 8);
}

void fetch_tq1(const uint8_t* block, uint8_t* codes) {
  digits(block, 32, 5, codes);
  digits(block + 32, 16, 5, codes + 160);
  digits(block + 48, 4, 4, codes + 240);
}

// 2^112 puts the exponent of a half, shifted into place, right, subnormals included.
float from_half(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  const uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits |= special | uint32_t(half & 0x8000) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

float from_bfloat(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Latent weights as float32; `data` need not be aligned.
void fetch_floats(const TernarySource& source, int64_t row, int64_t k0, int64_t count, float* out) {
  const int64_t first = row * source.k + k0;
  if (source.kind == SourceKind::f32) {
    std::memcpy(out, source.data + 4 * first, size_t(4 * count));
    return;
  }
  uint16_t halves[kFetch];
  std::memcpy(halves, source.data + 2 * first, size_t(2 * count));
  if (source.kind == SourceKind::f16)
    for (int64_t i = 0; i < count; ++i) out[i] = from_half(halves[i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat(halves[i]);
}

// clamp(rint(w s), -1, 1) + 1: a tie at one half rounds to the even 0.
void fetch_latent(const TernarySource& source, float s, int64_t row, int64_t k0, int64_t count,
                  uint8_t* codes) {
  float w[kFetch];
  fetch_floats(source, row, k0, count, w);
  for (int64_t i = 0; i < count; ++i) {
    const float v = w[i] * s;
    codes[i] = uint8_t(1 + (v > 0.5f) - (v < -0.5f));
  }
}

// Eight sums, so that the order does not depend on how the compiler vectorises.
double absolute_sum(const TernarySource& source, int64_t row) {
  double sums[8] = {};
  float w[kFetch];
  for (int64_t k0 = 0; k0 < source.k; k0 += kFetch) {
    const int64_t count = std::min(kFetch, source.k - k0);
    fetch_floats(source, row, k0, count, w);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      for (int j = 0; j < 8; ++j) sums[j] += double(std::fabs(w[i + j]));
    for (; i < count; ++i) sums[i % 8] += double(std::fabs(w[i]));
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

[[noreturn]] void refuse_shape(const TernarySource& s, const char* wanted) {
  throw PackError(s.name + ": found a matrix of " + std::to_string(s.n) + " x " +
                  std::to_string(s.k) + ", wanted " + wanted);
}

}  // namespace

bool is_latent(SourceKind kind) {
  return kind == SourceKind::f32 || kind == SourceKind::f16 || kind == SourceKind::bf16;
}

int64_t source_bytes(const TernarySource& s) {
  const int64_t weights = s.n * s.k;
  switch (s.kind) {
    case SourceKind::codes:
      return weights;
    case SourceKind::hf:
    case SourceKind::i2_s_rows4:
      if (s.n % 4) refuse_shape(s, "a multiple of 4 rows");
      return weights / 4;
    case SourceKind::tq1_0:
    case SourceKind::tq2_0:
      if (s.k % kTqWeights) refuse_shape(s, "columns a multiple of 256");
      return weights / kTqWeights * (s.kind == SourceKind::tq1_0 ? kTq1Bytes : kTq2Bytes);
    case SourceKind::i2_s:
      if (weights % 128) refuse_shape(s, "a multiple of 128 weights");
      return weights / 4;
    case SourceKind::i2_s_arm:
      if (weights % 64) refuse_shape(s, "a multiple of 64 weights");
      return weights / 4;
    case SourceKind::f32:
      return 4 * weights;
    case SourceKind::f16:
    case SourceKind::bf16:
      return 2 * weights;
  }
  return 0;
}

float latent_inverse_scale(const TernarySource& source) {
  std::vector<double> rows(size_t(source.n));
  constexpr int64_t grain = 16;
  parallel_for((source.n + grain - 1) / grain, [&](int64_t task) {
    for (int64_t r = task * grain; r < std::min(source.n, (task + 1) * grain); ++r)
      rows[size_t(r)] = absolute_sum(source, r);
  });
  double sum = 0;
  for (int64_t r = 0; r < source.n; ++r) {
    if (!std::isfinite(rows[size_t(r)]))
      throw PackError(source.name + ": found a weight in row " + std::to_string(r) +
                      " that is not finite, wanted finite latent weights");
    sum += rows[size_t(r)];
  }
  const float mean = float(sum / std::max<double>(1, double(source.n) * double(source.k)));
  return 1.0f / std::max(mean, 1e-5f);
}

void fetch_codes(const TernarySource& source, float s, int64_t row, int64_t k0, int64_t count,
                 uint8_t* codes) {
  const int64_t n = source.n, k = source.k;
  const uint8_t* data = source.data;
  switch (source.kind) {
    case SourceKind::codes:
      for (int64_t i = 0; i < count; ++i) codes[i] = uint8_t(data[row * k + k0 + i] + 1);
      return;
    case SourceKind::hf:
      return shift_fields(data + row % (n / 4) * k + k0, int(row / (n / 4) * 2), count, codes);
    case SourceKind::i2_s_rows4:
      return shift_fields(data + row / 4 * k + k0, int(6 - 2 * (row % 4)), count, codes);
    case SourceKind::i2_s:
      return fetch_groups(data, row * k + k0, 32, count, codes);
    case SourceKind::i2_s_arm:
      return fetch_groups(data, row * k + k0, 16, count, codes);
    case SourceKind::tq1_0:
    case SourceKind::tq2_0: {
      const bool one = source.kind == SourceKind::tq1_0;
      const int64_t bytes = one ? kTq1Bytes : kTq2Bytes;
      const uint8_t* block = data + (row * k + k0) / kTqWeights * bytes;
      for (int64_t i = 0; i < count; i += kTqWeights, block += bytes)
        one ? fetch_tq1(block, codes + i) : fetch_tq2(block, codes + i);
      return;
    }
    case SourceKind::f32:
    case SourceKind::f16:
    case SourceKind::bf16:
      return fetch_latent(source, s, row, k0, count, codes);
  }
}

}  // namespace bitnet
