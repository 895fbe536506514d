// Attention over arrays with int8 scores and values in half precision, both on the matrix units:
//
//   S = (codes of Q) (codes of K)^T    m16n8k32, integers: the CPU's
//   s = S k_scale[j] q_scale[i] scale  then flash_half.cuh
//
// Positions, windows and lengths are those of attention.cu, without its other options. T is half or
// bfloat16, the type of v; kWidth what dk and dv are padded to. kAsync: v is in whole aligned words
// of 16 bytes.
#include "code_tiles.cuh"
#include "codes.cuh"
#include "half_tiles.cuh"
#include "merge_parts.cuh"

// Codes [vectors][padded] and scales [vectors], in whole words of 16 bytes.
struct Codes {
  const int8_t* codes;
  const float* scales;
  int32_t padded;
};

// 64 keys from `start` on, and behind them their scales; zeros from `valid` on and past the width.
template <int kWidth>
INLINE void copy_codes(uint8_t* to, const Codes& from, int32_t start, int32_t valid) {
  constexpr int kWords = kWidth / 16;
  for (int i = threadIdx.x; i < kBlockKeys * kWords; i += blockDim.x) {
    const int32_t key = start + i / kWords, byte = i % kWords * 16;
    const bool exists = key < valid && byte < from.padded;
    copy_async(to + code_offset<kWidth>(i / kWords, i % kWords),
               exists ? from.codes + int64_t(key) * from.padded + byte : from.codes, exists);
  }
  for (int i = threadIdx.x; i < kBlockKeys / 4; i += blockDim.x) {
    const bool exists = start + 4 * i < valid;
    copy_async(to + kBlockKeys * kWidth + 16 * i, from.scales + (exists ? start + 4 * i : 0),
               exists);
  }
}

// s = codes' dots times key_scales. |dot| <= 127^2 * 128 < 2^22: added to the bits of 1.5 * 2^23 it
// makes the float 1.5 * 2^23 + dot.
template <int kWidth>
INLINE void score_codes(const uint8_t* keys, const uint32_t (&q)[kWidth / 32][4],
                        float (&s)[kBlockKeys / 8][4]) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
  const float* scales = reinterpret_cast<const float*>(keys + kBlockKeys * kWidth);
  int32_t dots[kBlockKeys / 8][4];
#pragma unroll
  for (int n = 0; n < kBlockKeys / 8; ++n)
    dots[n][0] = dots[n][1] = dots[n][2] = dots[n][3] = 0x4b400000;
#pragma unroll
  for (int step = 0; step < kWidth / 32; ++step)
#pragma unroll
    for (int n = 0; n < kBlockKeys / 8; n += 2) {
      uint32_t k[4];
      const int key = 8 * (n + matrix / 2) + row;
      load_matrices(k, keys + code_offset<kWidth>(key, 2 * step + matrix % 2));
      mma_s8(dots[n], q[step], {k[0], k[1]});
      mma_s8(dots[n + 1], q[step], {k[2], k[3]});
    }
#pragma unroll
  for (int n = 0; n < kBlockKeys / 8; ++n) {
    const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * n + lane % 4 * 2);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float dot = sub_rn(__int_as_float(dots[n][e]), 12582912.0f);
      s[n][e] = mul_rn(dot, e % 2 ? scale.y : scale.x);
    }
  }
}

// A block has 16 query vectors a warp of one batch entry and kv head: vector v is query head v %
// group of row v / group. grid (batch x tiles x parts, kv_heads), block 32 x warps; shared memory:
// two stages of 64 keys, their scales and values, then HalfTotal's.
template <class T, int kWidth, bool kAsync>
__global__ void __launch_bounds__(32 * kMostWarps, 2)
    attention_int8(const int8_t* q, const float* q_scales,  // [batch][q_heads][tq][padded], ..
                   const int8_t* k, const float* k_scales,  // [batch][kv_heads][tk][padded], ..
                   int32_t padded, const void* v, int32_t v_kind, int64_t v_batch, int64_t v_head,
                   int64_t v_row,
                   void* out,  // [batch][q_heads][tq][dv]
                   int32_t out_kind,
                   float* states,  // [batch][q_heads][tq][parts][state], or null: not split
                   int32_t parts,  // chunks of keys that have a block each; 1: not split
                   int32_t tq, int32_t tk, int32_t group, int32_t kv_heads, int32_t dv,
                   const int64_t* lengths,  // [batch] keys that exist, or null
                   int64_t past, int64_t left, int64_t right, float scale) {
  DYNAMIC_SHARED(bytes);
  using State = HalfFlash<T, kWidth>;
  constexpr int kKeyBytes = kBlockKeys * (kWidth + 4), kStage = kKeyBytes + kBlockKeys * kWidth * 2;
  constexpr int kChunk = HalfPart::kChunkKeys;
  const int32_t vectors = kWarpVectors * (blockDim.x / 32), count = tq * group;
  const int32_t tiles = (count + vectors - 1) / vectors;
  const int32_t part = blockIdx.x % parts, index = int32_t(blockIdx.x) / parts;
  const int32_t batch = index / tiles, kv_head = blockIdx.y, q_heads = kv_heads * group;
  const int64_t offset = lengths ? lengths[batch] - tq : past;
  const int32_t valid = lengths ? clamp(lengths[batch], tk) : tk;
  // The last tiles may have the most keys: they go first.
  const int32_t first = (tiles - 1 - index % tiles) * vectors;
  const auto low = [&](int32_t vector) { return clamp(vector / group + offset - left, tk); };
  const auto high = [&](int32_t vector) {
    return clamp(vector / group + offset + right + 1, valid);
  };
  const auto last_of = [&](int32_t from, int32_t n) { return min(from + n, count) - 1; };
  const auto head = [&](int32_t vector) {
    return int64_t(batch) * q_heads + kv_head * group + vector % group;
  };

  const int32_t own = first + int32_t(threadIdx.x) / 32 * kWarpVectors;  // this warp's
  Sight sight;
  sight.begin = low(own);
  sight.end = own < count ? high(last_of(own, kWarpVectors)) : 0;
  uint32_t queries[kWidth / 32][4];
  float scales[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t vector = own + State::vector(h);
    sight.low[h] = low(vector);
    sight.high[h] = vector < count ? high(vector) : 0;
    const bool sees = sight.low[h] < sight.high[h];
    const int64_t row = sees ? head(vector) * tq + vector / group : 0;
    // Of a vector that sees no key, any number: its scores are all -inf.
    scales[h] =
        sees ? mul_rn(q_scales[head(vector) * whole_words(tq) + vector / group], scale) : 1.0f;
#pragma unroll
    for (int i = 0; i < kWidth / 16; ++i) {  // words of 16 bytes, four of each this thread's
      const int byte = 16 * i + threadIdx.x % 4 * 4;
      const bool exists = sees && byte < padded;
      queries[i / 2][i % 2 * 2 + h] =
          exists ? *reinterpret_cast<const uint32_t*>(q + row * padded + byte) : 0;
    }
  }

  const bool split = states != nullptr;
  const int32_t end_of_all = high(last_of(first, vectors));
  const int32_t begin = max(low(first), split ? part * kChunk : 0) / kBlockKeys * kBlockKeys;
  const int32_t end = split ? min(end_of_all, (part + 1) * kChunk) : end_of_all;
  const int64_t kv_row = int64_t(batch) * kv_heads + kv_head;
  const Codes keys = {k + kv_row * tk * padded, k_scales + kv_row * whole_words(tk), padded};
  const Vectors values = {static_cast<const T*>(v) + batch * v_batch + kv_head * v_head, nullptr,
                          v_kind, dv, v_row};
  HalfTotal<T, kWidth> total(bytes + 2 * kStage);
  const auto load = [&](int32_t start, uint8_t* to) {
    copy_codes<kWidth>(to, keys, start, valid);
    load_tile<T, kWidth, kAsync>(to + kKeyBytes, values, [&](int j) {
      return start + j < valid ? int64_t(start + j) : int64_t(-1);
    });
  };
  walk<kStage>(begin, end, bytes, sight, total, load,
               [&](State& state, int32_t start, const uint8_t* stage) {
                 float s[kBlockKeys / 8][4];
                 score_codes<kWidth>(stage, queries, s);
                 state.add(s, stage + kKeyBytes, scales, start, sight.low, sight.high);
               });
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = sum_of_lanes<HalfPart::kLanes>(total.l[h]);
    const int32_t vector = own + State::vector(h);
    if (vector >= count) continue;
    const int64_t row = head(vector) * tq + vector / group;
    if (split) {
      total.store(h, states + (row * parts + part) * state_floats<HalfPart>(dv), dv);
      continue;
    }
    total.each(h, dv, sum, [&](int32_t d, float x) { write(out, out_kind, row * dv + d, x); });
  }
}
