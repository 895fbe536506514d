// Causal attention over a cache in half precision (flash_half.cuh): T is half or bfloat16, kWidth
// what dk and dv are padded to. q is rounded to T, and so are keys and values of another type,
// int8 ones after their scale.
//
// A block has 16 query vectors a warp, of one sequence and kv head: vector v is query head v %
// group of row v / group. While one block of 64 keys is worked on, the next comes.
//
// Rows that append_rows (kv_append.cu) has turned and stored: a block goes over all chunks of 256
// keys. A step, one more row of each sequence: the block turns its queries and stores the row's key
// and value itself; it has one chunk, and the last of a row's to end merges the states of all. The
// bits are the same.
#include "half_tiles.cuh"
#include "paged.cuh"
#include "turned.cuh"

// A step's own key and value.
struct Own {
  Turned k, v;
  int32_t dk, dv, key_width, value_width;
  int64_t to;  // row of the cache
};

// Into the cache, by the first warp and the last.
template <class T>
INLINE void append(const Own& own, void* keys, void* values, float* key_scales,
                   float* value_scales) {
  const int32_t warp = threadIdx.x / 32, last = int32_t(blockDim.x) / 32 - 1;
  T* key = static_cast<T*>(keys) + own.to * own.key_width;
  T* value = static_cast<T*>(values) + own.to * own.value_width;
  if (warp == 0) put(own.k, own.dk, key, own.key_width, key_scales + own.to);
  if (warp == last) put(own.v, own.dv, value, own.value_width, value_scales + own.to);
}

// grid (tiles x parts, kv_heads, sequences), block 32 x warps; shared memory: two stages of a tile
// of keys and one of values, then HalfTotal's.
template <class T, int kWidth, bool kAsync>
__global__ void __launch_bounds__(32 * kMostWarps, 2)
    attend_half(const float* q,                // [rows][q | k | v] of q_stride floats
                int64_t q_stride, float* out,  // [rows][out_stride], query head h at h dv
                int64_t out_stride,
                float* states,     // of a step: [rows][q_heads][parts][state]
                int32_t* tickets,  // of a step: [rows][kv_heads][tiles], zero; else null
                int32_t parts,     // chunks of the longest sequence of a step; else 1
                const float* cos, const float* sin,  // of a step: [positions][dk / 2], or null
                int32_t positions,                   // that cos, or else the cache, has room for
                const int32_t* starts, const int32_t* lengths, const uint8_t* active,
                const int32_t* table, int32_t pages_each, int32_t page_tokens, void* keys,
                void* values, float* key_scales, float* value_scales, int32_t kind, int32_t group,
                int32_t kv_heads, int32_t dk, int32_t dv, int32_t key_width, int32_t value_width,
                int32_t left, float scale) {
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
  const bool step = tickets != nullptr;
  if (step && rows.count == 0 && part == 0) {  // inactive
    float* to = out + sequence * out_stride + (int64_t(kv_head) * group + first) * dv;
    for (int32_t i = threadIdx.x; i < min(vectors, group - first) * dv; i += blockDim.x)
      to[i] = 0.0f;
  }
  if (first >= count) return;
  const auto position = [&](int32_t vector) { return rows.held + vector / group; };
  const auto row = [&](int32_t vector) { return int64_t(rows.first + vector / group); };
  const auto head = [&](int32_t vector) { return kv_head * group + vector % group; };
  // Replays of a captured step past the cache's end read what is there.
  const int32_t newest =
      min(position(min(first + vectors, count) - 1), pages_each * page_tokens - 1);
  const int32_t oldest = lowest_key(position(first), left);

  const int32_t first_part = oldest / kChunk, last_part = min(newest / kChunk, parts - 1);
  if (step && (part < first_part || part > last_part)) return;

  const int32_t own = first + int32_t(threadIdx.x) / 32 * kWarpVectors;  // this warp's first
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
  float* turned =
      reinterpret_cast<float*>(bytes + kTileBytes);  // [vectors][dk], till they are used
  if (step) {
    const float *own_row = q + sequence * q_stride, *key = own_row + int64_t(q_heads) * dk;
    const bool has_room = rows.held < positions;
    const int64_t angles = int64_t(rows.held) * (dk / 2);
    const float* c = cos && has_room ? cos + angles : nullptr;
    const float* s = cos && has_room ? sin + angles : nullptr;
    for (int32_t i = threadIdx.x; i < min(vectors, count - first) * dk; i += blockDim.x)
      turned[i] = Turned{own_row + int64_t(head(first + i / dk)) * dk, c, s, dk / 2}(i % dk);
    if (has_room && part == last_part) {
      const float* value = key + int64_t(kv_heads) * dk + int64_t(kv_head) * dv;
      const Own own = {{key + int64_t(kv_head) * dk, c, s, dk / 2},
                       {value, nullptr, nullptr, 0},
                       dk,
                       dv,
                       key_width,
                       value_width,
                       page_row(pages, sequence, kv_head, rows.held)};
      if (kind == kF32) append<float>(own, keys, values, key_scales, value_scales);
      if (kind == kF16) append<half_t>(own, keys, values, key_scales, value_scales);
      if (kind == kI8) append<int8_t>(own, keys, values, key_scales, value_scales);
    }
    __syncthreads();
  }
  load_queries<T, kWidth>(
      bytes, {step ? turned : q, nullptr, kF32, dk, 1},
      [&](int i) {
        const int32_t vector = first + i;
        if (i >= vectors || vector >= count) return int64_t(-1);
        return step ? int64_t(i) * dk : row(vector) * q_stride + int64_t(head(vector)) * dk;
      },
      queries);

  const int32_t begin = max(oldest, step ? part * kChunk : 0) / kBlockKeys * kBlockKeys;
  const int32_t end = step ? min(newest + 1, (part + 1) * kChunk) : newest + 1;
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
  const bool alone = !step || first_part == last_part;
  const int64_t size = state_floats<HalfPart>(dv);
  const auto states_of = [&](int32_t vector) {
    return states + (row(vector) * q_heads + head(vector)) * parts * size;
  };
  const auto out_of = [&](int32_t vector) {
    return out + row(vector) * out_stride + int64_t(head(vector)) * dv;
  };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = sum_of_lanes<HalfPart::kLanes>(total.l[h]);
    const int32_t vector = own + State::vector(h);
    if (vector >= count) continue;
    if (!alone) {
      total.store(h, states_of(vector) + part * size, dv);
      continue;
    }
    float* to = out_of(vector);
    total.each(h, dv, sum, [to](int32_t d, float x) { to[d] = x; });
  }
  if (alone) return;
  const int64_t ticket = (int64_t(sequence) * kv_heads + kv_head) * tiles + first / vectors;
  if (!comes_last(tickets + ticket, last_part - first_part + 1)) return;
  for (int32_t vector = first; vector < min(first + vectors, count); ++vector)
    for (int32_t d = threadIdx.x; d < (dv + 31) / 32 * 32; d += blockDim.x)
      merge_states<HalfPart>(states_of(vector), first_part, last_part, d, dv,
                             [&](float x) { out_of(vector)[d] = x; });
}
