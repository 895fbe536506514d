// Causal attention over a cache of many rows, with the bits of the CPU's (flash.cuh).
//
//   s[j] = (q . k[j]) * scale          int8: (dot * key_scale[j]) * scale
//   out  = softmax(s) v                int8: each weight times value_scale[j] first
//
// Row i of a sequence stands at position held + i and sees keys [position - left, position]. A tile
// is 8 kEach query vectors of one sequence and kv head: vector v is query head v % group of row
// v / group. A block goes over all chunks of 512 keys. attend_step.cu has a row of each sequence.
#include "flash.cuh"
#include "paged.cuh"

struct Layer {  // of the cache
  Pages pages;
  const void *keys, *values;
  const float *key_scales, *value_scales;
  int32_t kind, dk, dv, key_width, value_width;
};

// A block's vectors: its thread's own ones see keys [low[r], high[r]).
template <int kEach>
struct Tile {
  SequenceRows rows;
  int32_t sequence, kv_head, group, first, count;  // vectors [first, first + count)
  int32_t low[kEach], high[kEach];
  int32_t oldest, newest;  // keys that some vector sees

  INLINE int32_t position(int32_t v) const { return rows.held + v / group; }
  INLINE int64_t row(int32_t v) const { return rows.first + v / group; }
  INLINE int32_t head(int32_t v) const { return kv_head * group + v % group; }
};

// Dimensions d..d + n - 1 of the tile's query vectors.
template <int kEach>
INLINE void load_queries(const Layer& layer, const Tile<kEach>& tile, const FlashMemory<kEach>& at,
                         const float* q, int64_t q_stride, int32_t d, int n) {
  load_tile(at.q, q, kF32, FlashMemory<kEach>::kVectors, n, [&](int i) {
    const int32_t v = tile.first + i;
    return i < tile.count ? tile.row(v) * q_stride + int64_t(tile.head(v)) * layer.dk + d : -1;
  });
}

// One block of keys from `start` on. Queries of more than kSlice dimensions come and go.
template <int kEach, int kWide>
INLINE void visit(const Layer& layer, const Tile<kEach>& tile, const FlashMemory<kEach>& at,
                  const float* q, int64_t q_stride, float scale, int32_t value_column,
                  int32_t start, Flash<kEach, kWide>& state) {
  using State = Flash<kEach, kWide>;
  const int64_t base = page_row(layer.pages, tile.sequence, tile.kv_head, start);
  const int32_t valid = min(kBlockKeys, tile.newest + 1 - start);
  float s[kEach][kTiles] = {};
  for (int32_t d = 0; d < layer.dk; d += kSlice) {
    const int n = min(kSlice, layer.dk - d);
    __syncthreads();
    if (layer.dk > kSlice) load_queries(layer, tile, at, q, q_stride, d, n);
    load_tile(at.kv, layer.keys, layer.kind, kBlockKeys, n,
              [&](int j) { return j < valid ? (base + j) * layer.key_width + d : -1; });
    __syncthreads();
    State::add_dots(at, n, s);
  }
  float value_scales[kTiles];
  uint32_t visible[kEach] = {};
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int32_t j = State::key(t);
    const bool quantised = layer.kind == kI8 && j < valid;
    const float key_scale = quantised ? layer.key_scales[base + j] : 1.0f;
    value_scales[t] = quantised ? layer.value_scales[base + j] : 1.0f;
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      s[r][t] = mul_rn(mul_rn(s[r][t], key_scale), scale);
      visible[r] |= uint32_t(start + j >= tile.low[r] && start + j < tile.high[r]) << t;
    }
  }
  state.soften(at, s, visible, [&](int, int t, float p) { return mul_rn(p, value_scales[t]); });
  __syncthreads();
  load_tile(at.kv, layer.values, layer.kind, kBlockKeys, min(kWide, layer.dv - value_column),
            [&](int j) { return j < valid ? (base + j) * layer.value_width + value_column : -1; });
  __syncthreads();
  state.add_values(at, max(tile.oldest - start, 0), valid);
}

// grid (tiles, kv_heads x slices of kWide values, sequences), block kThreads.
template <int kEach, int kWide>
__global__ void __launch_bounds__(kThreads, kEach == 1 ? 4 : 2)
    attend_rows(const float* q,                // [rows][q_stride], query head h at h dk
                int64_t q_stride, float* out,  // [rows][out_stride], query head h at h dv
                int64_t out_stride, const int32_t* starts, const int32_t* lengths,
                const uint8_t* active, const int32_t* table, int32_t pages_each,
                int32_t page_tokens, const void* keys, const void* values, const float* key_scales,
                const float* value_scales, int32_t kind, int32_t group, int32_t kv_heads,
                int32_t dk, int32_t dv, int32_t key_width, int32_t value_width, int32_t left,
                float scale) {
  DYNAMIC_SHARED(bytes);
  constexpr int kVectors = FlashMemory<kEach>::kVectors, kChunk = ExactPart::kChunkKeys;
  const FlashMemory<kEach> at(bytes);
  const Layer layer = {{table, pages_each, page_tokens, kv_heads},
                       keys,
                       values,
                       key_scales,
                       value_scales,
                       kind,
                       dk,
                       dv,
                       key_width,
                       value_width};
  Tile<kEach> tile;
  tile.sequence = blockIdx.z, tile.group = group;
  tile.kv_head = blockIdx.y % kv_heads;
  const int32_t value_column = int32_t(blockIdx.y / kv_heads) * kWide;
  tile.rows = rows_of(starts, lengths, active, tile.sequence);
  // The last tiles have the most keys: they go first.
  tile.first = int32_t(gridDim.x - 1 - blockIdx.x) * kVectors;
  tile.count = min(kVectors, tile.rows.count * group - tile.first);
  if (tile.count <= 0) return;
  tile.newest = tile.position(tile.first + tile.count - 1);
  tile.oldest = lowest_key(tile.position(tile.first), left);

  using State = Flash<kEach, kWide>;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int32_t v = tile.first + State::vector(r), position = tile.position(v);
    tile.low[r] = lowest_key(position, left);
    tile.high[r] = State::vector(r) < tile.count ? position + 1 : 0;
  }
  State total, state;
  total.clear();
  if (dk <= kSlice) load_queries(layer, tile, at, q, q_stride, 0, dk);
  for (int32_t chunk = tile.oldest / kChunk; chunk <= tile.newest / kChunk; ++chunk) {
    state.clear();
    const int32_t end = min((chunk + 1) * kChunk, tile.newest + 1);
    int32_t start = max(chunk * kChunk, tile.oldest / kBlockKeys * kBlockKeys);
    for (; start < end; start += kBlockKeys)
      visit(layer, tile, at, q, q_stride, scale, value_column, start, state);
    total.merge(state);
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const float sum = sum_of_lanes<kLanes>(total.l[r]);
    if (State::vector(r) >= tile.count) continue;
    const int32_t v = tile.first + State::vector(r);
    float* to = out + tile.row(v) * out_stride + int64_t(tile.head(v)) * dv + value_column;
#pragma unroll
    for (int i = 0; i < State::kColumns; ++i)
      if (value_column + State::column(i) < dv) to[State::column(i)] = divided(total.o[r][i], sum);
  }
}
