// Attention over arrays in half precision (flash_half.cuh): positions, windows and lengths of
// attention.cu, without its other options. T is half or bfloat16, kWidth what dk and dv are padded
// to; q, k and v of another type are rounded to T. kAsync: they are T already, in whole aligned
// words of 16 bytes.
#include "half_tiles.cuh"
#include "merge_parts.cuh"

// Element `offset` of an array.
INLINE const void* element(const void* data, int32_t kind, int64_t offset) {
  return static_cast<const uint8_t*>(data) + offset * (kind == kF32 ? 4 : 2);
}

// A block has 16 query vectors a warp of one batch entry and kv head: vector v is query head v %
// group of row v / group. grid (batch x tiles x parts, kv_heads), block 32 x warps; shared memory:
// two stages of a tile of keys and one of values, then HalfTotal's.
template <class T, int kWidth, bool kAsync>
__global__ void __launch_bounds__(32 * kMostWarps, 2)
    attention_half(const void* q, int32_t q_kind, int64_t q_batch, int64_t q_head, int64_t q_row,
                   const void* k, int32_t k_kind, int64_t k_batch, int64_t k_head, int64_t k_row,
                   const void* v, int32_t v_kind, int64_t v_batch, int64_t v_head, int64_t v_row,
                   void* out,  // [batch][q_heads][tq][dv]
                   int32_t out_kind,
                   float* states,  // [batch][q_heads][tq][parts][state], or null: not split
                   int32_t parts,  // chunks of keys that have a block each; 1: not split
                   int32_t tq, int32_t tk, int32_t group, int32_t kv_heads, int32_t dk, int32_t dv,
                   const int64_t* lengths,  // [batch] keys that exist, or null
                   int64_t past, int64_t left, int64_t right, float scale) {
  DYNAMIC_SHARED(bytes);
  using State = HalfFlash<T, kWidth>;
  constexpr int kTileBytes = kBlockKeys * kWidth * 2, kChunk = HalfPart::kChunkKeys;
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
  const auto head = [&](int32_t vector) { return kv_head * group + vector % group; };
  const auto last_of = [&](int32_t from, int32_t n) { return min(from + n, count) - 1; };

  const int32_t own = first + int32_t(threadIdx.x) / 32 * kWarpVectors;  // this warp's
  Sight sight;
  sight.begin = low(own);
  sight.end = own < count ? high(last_of(own, kWarpVectors)) : 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t vector = own + State::vector(h);
    sight.low[h] = low(vector);
    sight.high[h] = vector < count ? high(vector) : 0;
  }
  uint32_t queries[State::kSteps][4];
  load_queries<T, kWidth>(
      bytes, {element(q, q_kind, batch * q_batch), nullptr, q_kind, dk, 1},
      [&](int i) {
        const int32_t vector = first + i;
        return i < vectors && vector < count ? head(vector) * q_head + vector / group * q_row
                                             : int64_t(-1);
      },
      queries);

  const bool split = states != nullptr;
  const int32_t end_of_all = high(last_of(first, vectors));
  const int32_t begin = max(low(first), split ? part * kChunk : 0) / kBlockKeys * kBlockKeys;
  const int32_t end = split ? min(end_of_all, (part + 1) * kChunk) : end_of_all;
  const Vectors keys = {element(k, k_kind, batch * k_batch + kv_head * k_head), nullptr, k_kind, dk,
                        k_row};
  const Vectors values = {element(v, v_kind, batch * v_batch + kv_head * v_head), nullptr, v_kind,
                          dv, v_row};
  HalfTotal<T, kWidth> total(bytes + 4 * kTileBytes);
  const auto load = [&](int32_t start, uint8_t* to) {
    const auto row_of = [&](int j) { return start + j < valid ? int64_t(start + j) : int64_t(-1); };
    load_tile<T, kWidth, kAsync>(to, keys, row_of);
    load_tile<T, kWidth, kAsync>(to + kTileBytes, values, row_of);
  };
  walk<2 * kTileBytes>(begin, end, bytes, sight, total, load,
                       [&](State& state, int32_t start, const uint8_t* stage) {
                         state.visit(stage, stage + kTileBytes, queries, scale, start, sight.low,
                                     sight.high);
                       });
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = sum_of_lanes<HalfPart::kLanes>(total.l[h]);
    const int32_t vector = own + State::vector(h);
    if (vector >= count) continue;
    const int64_t row = (int64_t(batch) * q_heads + head(vector)) * tq + vector / group;
    if (split) {
      total.store(h, states + (row * parts + part) * state_floats<HalfPart>(dv), dv);
      continue;
    }
    total.each(h, dv, sum, [&](int32_t d, float x) { write(out, out_kind, row * dv + d, x); });
  }
}
