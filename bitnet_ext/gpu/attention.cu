// Attention over arrays of any strides with every option of the CPU's, and its bits: the formulas
// of csrc/attention/dense.h on the tiles of flash.cuh.
//
//   raw[j] = (q . k[j]) * scale
//            int8: (codes' dot * key_scale[j]) * (query_scale * scale)
//   s[j]   = softcap * tanh(raw[j] / softcap) + mask[j]
//   out    = sum p[j] v[j],  p = softmax(s),  dropout: p[j] kept[j] / (1 - dropout_p)
//
// A key is seen where position, lengths and mask allow it and s[j] is not -inf. Row i stands at i +
// offset and sees keys [i + offset - left, i + offset + right]; a row that sees none gives zeros.
// int8: csrc/attention_int8/attention_int8.h. Products of codes with |code| <= 127 are summed in
// integers on the matrix units, those of weights, codes of at most 2047, in float: 1024 and 64 of
// them stay below 2^24 and are exact.
#include "code_tiles.cuh"
#include "dense.cuh"
#include "merge_parts.cuh"

// The vectors of a block, [first, first + count); its thread's own see keys [low[r], high[r]).
template <int kEach>
struct Tile {
  int32_t first, count, low[kEach], high[kEach];
  int32_t begin, end;  // keys to visit
};

template <int kEach>
INLINE void load_queries(const Task& t, const Tile<kEach>& tile, const FlashMemory<kEach>& at,
                         int32_t d, int n) {
  constexpr int kVectors = FlashMemory<kEach>::kVectors;
  const auto row_of = [&](int i) {
    const int32_t v = tile.first + i;
    return i < tile.count ? t.batch * t.q.batch + t.head(v) * t.q.head + t.row(v) * t.q.row + d
                          : int64_t(-1);
  };
  if (t.q_scales)
    load_codes<kSlice>(reinterpret_cast<uint8_t*>(at.q), static_cast<const int8_t*>(t.q.data),
                       max(kVectors, 16), n, row_of);
  else
    load_tile(at.q, t.q.data, t.q.kind, kVectors, n, row_of);
}

// Dot products of this thread's vectors and keys, of codes: made by other threads.
template <int kEach, class KeyOf>
INLINE void code_dots(const Task& t, const Tile<kEach>& tile, const FlashMemory<kEach>& at,
                      KeyOf key_of, float (&s)[kEach][kTiles]) {
  using State = Flash<kEach, 64>;
  uint8_t *queries = reinterpret_cast<uint8_t*>(at.q), *keys = reinterpret_cast<uint8_t*>(at.kv);
  CodeDots<FlashMemory<kEach>::kVectors, kSlice> dots;
  for (int32_t d = 0; d < t.dk; d += kSlice) {
    const int width = min(kSlice, t.dk - d);
    __syncthreads();
    if (t.dk > kSlice) load_queries(t, tile, at, d, width);
    load_codes<kSlice>(keys, static_cast<const int8_t*>(t.k.data) + d, kBlockKeys, width, key_of);
    __syncthreads();
    dots.add(queries, keys, width);
  }
  dots.store(at.p, kWeights);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int i = 0; i < kTiles; ++i) s[r][i] = at.p[State::vector(r) * kWeights + State::key(i)];
}

// Scores of this thread's dot products, one after the other: by way of shared memory, where an
// index need not be a constant.
template <int kEach>
INLINE void score_all(const Task& t, const Tile<kEach>& tile, const FlashMemory<kEach>& at,
                      bool scores_too, int32_t start, float (&s)[kEach][kTiles]) {
  using State = Flash<kEach, 64>;
  float* own = at.p + State::vector(0) * kWeights + State::lane();
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int i = 0; i < kTiles; ++i) own[r * kWeights + i * kLanes] = s[r][i];
#pragma unroll 1
  for (int r = 0; r < kEach && State::vector(r) < tile.count; ++r) {
    const int32_t v = tile.first + State::vector(r);
    const Extent extent = extent_of(t, v);
#pragma unroll 1
    for (int i = 0; i < kTiles; ++i) {
      const int32_t key = start + State::key(i);
      const bool in_reach = key >= extent.low && key < extent.high;
      float &x = own[r * kWeights + i * kLanes], slope;
      x = in_reach || (scores_too && key < t.tk) ? score(t, v, key, in_reach, x, slope)
                                                 : -INFINITY_F;
    }
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      s[r][i] = State::vector(r) < tile.count ? own[r * kWeights + i * kLanes] : -INFINITY_F;
}

// The weights of a block in shared memory, each this thread's own, become codes of at most 2047;
// factors: what a sum of products of theirs is to be multiplied by.
template <int kEach, int kWide>
INLINE void code_weights(const Task& t, const FlashMemory<kEach>& at, int32_t start,
                         const uint32_t (&visible)[kEach], float (&factors)[kEach]) {
  using State = Flash<kEach, kWide>;
  const float* scales =
      t.v_scales + (int64_t(t.batch) * t.kv_heads + t.kv_head) * whole_words(t.tk);
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    float* own = at.p + State::vector(r) * kWeights;
    float top = 1e-30f, w[kTiles];
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      w[i] = 0.0f;
      if (!(visible[r] >> i & 1)) continue;
      const float scale = scales[start + State::key(i)];
      if (scale == scale) w[i] = mul_rn(own[State::key(i)], scale);
      finite = finite && scale == scale;
      top = max_num(top, w[i]);
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      top = max_num(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const uint32_t bad = __ballot_sync(0xffffffffu, !finite) >> (threadIdx.x & 16) & 0xffff;
    const float multiply = div_rn(2047.0f, top);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      if (visible[r] >> i & 1) own[State::key(i)] = float(round_to_int(mul_rn(w[i], multiply)));
    factors[r] = bad ? __int_as_float(0x7fc00000) : div_rn(top, 2047.0f);
  }
}

// Keys [start, start + 64) of the block's vectors.
template <int kEach, int kWide>
INLINE void visit(const Task& t, const Tile<kEach>& tile, const FlashMemory<kEach>& at,
                  int32_t value_column, bool scores_too, int32_t start,
                  Flash<kEach, kWide>& state) {
  using State = Flash<kEach, kWide>;
  const int32_t n = min(kBlockKeys, t.tk - start);
  const int64_t key_row = t.batch * t.k.batch + t.kv_head * t.k.head + start * t.k.row;
  const int64_t value_row = t.batch * t.v.batch + t.kv_head * t.v.head + start * t.v.row;
  float s[kEach][kTiles] = {};
  const auto key_of = [&](int j) { return j < n ? key_row + j * t.k.row : int64_t(-1); };
  if (t.q_scales) code_dots(t, tile, at, key_of, s);
  for (int32_t d = t.q_scales ? t.dk : 0; d < t.dk; d += kSlice) {
    const int width = min(kSlice, t.dk - d);
    __syncthreads();
    if (t.dk > kSlice) load_queries(t, tile, at, d, width);
    load_tile(at.kv, t.k.data, t.k.kind, kBlockKeys, width,
              [&](int j) { return j < n ? key_of(j) + d : int64_t(-1); });
    __syncthreads();
    State::add_dots(at, width, s);
  }
  uint32_t visible[kEach] = {}, kept[kEach];
  if (t.plain()) {
#pragma unroll
    for (int r = 0; r < kEach; ++r)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int32_t key = start + State::key(i);
        s[r][i] = key >= tile.low[r] && key < tile.high[r] ? mul_rn(s[r][i], t.scale) : -INFINITY_F;
      }
  } else {
    score_all(t, tile, at, scores_too, start, s);
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) visible[r] |= uint32_t(s[r][i] != -INFINITY_F) << i;
    kept[r] =
        t.dropped == 0 ? ~0u : kept_of(t, tile.first + State::vector(r), start + State::lane());
  }
  state.soften(at, s, visible, [&](int r, int i, float p) {
    return t.dropped == 0 ? p : kept[r] >> i & 1 ? mul_rn(p, t.kept_scale) : 0.0f;
  });
  float factors[kEach];
  if (t.v_scales) code_weights<kEach, kWide>(t, at, start, visible, factors);
  __syncthreads();
  load_tile(at.kv, t.v.data, t.v.kind, kBlockKeys, min(kWide, t.dv - value_column),
            [&](int j) { return j < n ? value_row + j * t.v.row + value_column : int64_t(-1); });
  __syncthreads();
  const int low = max(tile.begin - start, 0), high = min(tile.end - start, n);
  if (!t.v_scales) return state.add_values(at, low, high);
  State sums;
  sums.clear();
  sums.add_values(at, low, high);
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int i = 0; i < State::kColumns; ++i)
      state.o[r][i] = fma_rn(sums.o[r][i], factors[r], state.o[r][i]);
}

// grid (batch x tiles x parts, kv_heads x slices of kWide values), block kThreads.
template <int kEach, int kWide>
__global__ void __launch_bounds__(kThreads, 2)
    attention(const void* q, int32_t q_kind, int64_t q_batch, int64_t q_head, int64_t q_row,
              const void* k, int32_t k_kind, int64_t k_batch, int64_t k_head, int64_t k_row,
              const void* v, int32_t v_kind, int64_t v_batch, int64_t v_head, int64_t v_row,
              const float* q_scales, const float* k_scales, const float* v_scales, void* out,
              int32_t out_kind, int64_t out_batch, int64_t out_head, int64_t out_row,
              float* states,  // [batch][q_heads][tq][parts][state], or null: not split
              int32_t parts,  // chunks of keys that have a block each; 1: not split
              int32_t tq, int32_t tk, int32_t group, int32_t kv_heads, int32_t dk, int32_t dv,
              const int64_t* lengths,  // [batch] keys that exist, row 0 at length - tq; or null
              int64_t past, int64_t left, int64_t right, float scale, float softcap,
              const void* mask, int32_t mask_kind, int64_t mask_batch, int64_t mask_head,
              int64_t mask_row, int64_t mask_step, int32_t mask_keys,
              const uint64_t* seeds,  // [batch], or null: seed + b seed_step
              uint64_t seed, uint64_t seed_step, int32_t dropped, float kept_scale, float* scores,
              int32_t score_kind,
              float* stats) {  // [batch][q_heads][tq][4]: m, 1 / l, or zeros; or null
  DYNAMIC_SHARED(bytes);
  constexpr int kVectors = FlashMemory<kEach>::kVectors, kChunk = ExactPart::kChunkKeys;
  using State = Flash<kEach, kWide>;
  const FlashMemory<kEach> at(bytes);
  Task t = {{q, q_kind, q_batch, q_head, q_row},
            {k, k_kind, k_batch, k_head, k_row},
            {v, v_kind, v_batch, v_head, v_row},
            q_scales,
            k_scales,
            v_scales,
            tq,
            tk,
            group,
            kv_heads,
            dk,
            dv,
            scale,
            softcap,
            mask,
            mask_kind,
            mask_batch,
            mask_head,
            mask_row,
            mask_step,
            mask_keys,
            dropped,
            kept_scale,
            seed,
            scores,
            score_kind,
            left,
            right,
            past};
  const int32_t tiles = (tq * group + kVectors - 1) / kVectors;
  const int32_t part = blockIdx.x % parts, index = int32_t(blockIdx.x) / parts;
  settle(t, index / tiles, blockIdx.y % kv_heads, lengths, seeds, seed_step);
  const OutRows to = {out, out_kind, out_batch, out_head, out_row};
  const int32_t slice = blockIdx.y / kv_heads, value_column = slice * kWide;
  const bool scores_too = score_kind != kNoScores && slice == 0;
  if (!scores_too) t.score_kind = kNoScores;
  // The last tiles may have the most keys: they go first.
  Tile<kEach> tile;
  tile.first = (tiles - 1 - index % tiles) * kVectors;
  tile.count = min(kVectors, tq * group - tile.first);
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const bool is_ours = State::vector(r) < tile.count;
    const Extent extent = extent_of(t, tile.first + State::vector(r));
    tile.low[r] = extent.low, tile.high[r] = is_ours ? extent.high : 0;
  }
  tile.begin = extent_of(t, tile.first).low;
  tile.end = extent_of(t, tile.first + tile.count - 1).high;
  if (scores_too) tile.begin = 0, tile.end = tk;

  if (dk <= kSlice) load_queries(t, tile, at, 0, dk);
  State total, state;
  total.clear();
  const bool split = states != nullptr;
  const int32_t first = split ? part : tile.begin / kChunk;
  const int32_t last = split ? part : (tile.end - 1) / kChunk;
  for (int32_t chunk = first; chunk <= last; ++chunk) {
    state.clear();
    const int32_t end = min((chunk + 1) * kChunk, tile.end);
    int32_t start = max(chunk * kChunk, tile.begin / kBlockKeys * kBlockKeys);
    for (; start < end; start += kBlockKeys)
      visit(t, tile, at, value_column, scores_too, start, state);
    total.merge(state);
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const float sum = sum_of_lanes<kLanes>(total.l[r]);
    if (State::vector(r) >= tile.count) continue;
    const int32_t vector = tile.first + State::vector(r);
    const int64_t row = t.out_row(vector);
    if (split) {
      float* part_state = states + (row * parts + part) * state_floats<ExactPart>(dv);
      total.store(r, part_state, value_column, dv);
      continue;
    }
#pragma unroll
    for (int i = 0; i < State::kColumns; ++i) {
      const int32_t column = value_column + State::column(i);
      if (column < dv)
        to.write(t.batch, t.head(vector), t.row(vector), column, divided(total.o[r][i], sum));
    }
    if (stats && State::lane() == 0 && slice == 0)
      *reinterpret_cast<float4*>(stats + 4 * row) =
          sum == 0.0f ? make_float4(0.0f, 0.0f, 0.0f, 0.0f)
                      : make_float4(total.m[r], div_rn(1.0f, sum), 0.0f, 0.0f);
    if (t.score_kind != kSoftmax) continue;
    // This thread wrote these very scores.
    float* own = scores + row * tk;
    for (int32_t key = State::lane(); key < tk; key += kLanes) {
      const float x = own[key];
      own[key] = x == -INFINITY_F ? 0.0f : div_rn(exp_rn(sub_rn(x, total.m[r])), sum);
    }
  }
}
