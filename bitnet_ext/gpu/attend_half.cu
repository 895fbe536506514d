// Causal attention over a cache in half precision (flash_half.cuh): T is half or bfloat16, kWidth
// what dk and dv are padded to. q is rounded to T, and so are keys and values of another type,
// int8 ones after their scale.
//
// A block has 16 query vectors a warp, of one sequence and kv head: vector v is query head v %
// group of row v / group. It goes over all chunks of 256 keys, or, split, over one of them, whose
// states merge_rows merges; the bits are the same. While one block of 64 keys is worked on, the
// next comes.
#include "half_tiles.cuh"
#include "merge_rows.cuh"

// grid (tiles x parts, kv_heads, sequences), block 32 x warps; shared memory: two stages of a tile
// of keys and one of values, then HalfTotal's.
template <class T, int kWidth, bool kAsync>
__global__ void __launch_bounds__(32 * kMostWarps, 2)
    attend_half(const float* q,                     // [rows][q_stride], query head h at h dk
                int64_t q_stride, float* out,       // [rows][out_stride], query head h at h dv
                int64_t out_stride, float* states,  // [rows][q_heads][parts][state], or null
                int32_t parts,                      // chunks that have a block each; 1: not split
                const int32_t* starts, const int32_t* lengths, const uint8_t* active,
                const int32_t* table, int32_t pages_each, int32_t page_tokens, const void* keys,
                const void* values, const float* key_scales, const float* value_scales,
                int32_t kind, int32_t group, int32_t kv_heads, int32_t dk, int32_t dv,
                int32_t key_width, int32_t value_width, int32_t left, float scale) {
  DYNAMIC_SHARED(bytes);
  using State = HalfFlash<T, kWidth>;
  constexpr int kTileBytes = kBlockKeys * kWidth * 2, kChunk = HalfPart::kChunkKeys;
  const Pages pages = {table, pages_each, page_tokens, kv_heads};
  const int32_t sequence = blockIdx.z, kv_head = blockIdx.y, q_heads = kv_heads * group;
  const SequenceRows rows = rows_of(starts, lengths, active, sequence);
  // The last tiles have the most keys: they go first.
  const int32_t part = blockIdx.x % parts, tiles = gridDim.x / parts;
  const int32_t vectors = kWarpVectors * (blockDim.x / 32);
  const int32_t first = (tiles - 1 - int32_t(blockIdx.x) / parts) * vectors;
  const int32_t count = rows.count * group;  // of the whole sequence
  if (first >= count) return;
  const auto position = [&](int32_t vector) { return rows.held + vector / group; };
  const auto row = [&](int32_t vector) { return int64_t(rows.first + vector / group); };
  const auto head = [&](int32_t vector) { return kv_head * group + vector % group; };
  // Replays of a captured step past the cache's end read what is there.
  const int32_t newest =
      min(position(min(first + vectors, count) - 1), pages_each * page_tokens - 1);
  const int32_t oldest = lowest_key(position(first), left);

  const int32_t own = first + int32_t(threadIdx.x) / 32 * kWarpVectors;  // this warp's
  Sight sight;
  sight.begin = lowest_key(position(own), left);
  sight.end = own < count ? position(min(own + kWarpVectors, count) - 1) + 1 : 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t vector = own + State::vector(h);
    sight.low[h] = lowest_key(position(vector), left);
    sight.high[h] = vector < count ? position(vector) + 1 : 0;
  }
  uint32_t queries[State::kSteps][4];
  load_queries<T, kWidth>(
      bytes, {q, nullptr, kF32, dk, 1},
      [&](int i) {
        const int32_t vector = first + i;
        return i < vectors && vector < count ? row(vector) * q_stride + int64_t(head(vector)) * dk
                                             : int64_t(-1);
      },
      queries);

  const bool split = states != nullptr;
  const int32_t begin = max(oldest, split ? part * kChunk : 0) / kBlockKeys * kBlockKeys;
  const int32_t end = split ? min(newest + 1, (part + 1) * kChunk) : newest + 1;
  const Vectors k = {keys, key_scales, kind, dk, key_width};
  const Vectors v = {values, value_scales, kind, dv, value_width};
  HalfTotal<T, kWidth> total(bytes + 4 * kTileBytes);
  const auto load = [&](int32_t start, uint8_t* to) {
    const int64_t base = page_row(pages, sequence, kv_head, start);
    const int32_t valid = newest + 1 - start;
    const auto row_of = [&](int j) { return j < valid ? base + j : int64_t(-1); };
    load_tile<T, kWidth, kAsync>(to, k, row_of);
    load_tile<T, kWidth, kAsync>(to + kTileBytes, v, row_of);
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
    if (split) {
      const int64_t index = (row(vector) * q_heads + head(vector)) * parts + part;
      total.store(h, states + index * state_floats<HalfPart>(dv), dv);
      continue;
    }
    float* to = out + row(vector) * out_stride + int64_t(head(vector)) * dv;
    total.each(h, dv, sum, [to](int32_t d, float x) { to[d] = x; });
  }
}
