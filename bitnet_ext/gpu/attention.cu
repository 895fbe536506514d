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
// Products of int8 codes are summed in integers on the matrix units: |code| <= 127, so a dot
// product of 1024 is below 2^24, and exact as a float too.
#include "code_tiles.cuh"
#include "codes.cuh"
#include "flash.cuh"
#include "merge_parts.cuh"
#include "philox.cuh"

enum MaskKind : int32_t { kNone, kBool, kMaskF32, kMaskF16, kMaskBf16 };
enum ScoreKind : int32_t { kNoScores, kRaw, kSoftcap, kMask, kSoftmax };

// [batch][heads][rows][..], contiguous columns; strides in elements.
struct Rows {
  const void* data;
  int32_t kind;
  int64_t batch, head, row;
};

struct Task {
  Rows q, k, v;
  const float *q_scales, *k_scales;  // int8: [batch][heads][whole_words(rows)], else null
  int32_t tq, tk, group, kv_heads, dk, dv;
  float scale, softcap;  // softcap 0: none
  const void* mask;
  int32_t mask_kind;
  int64_t mask_batch, mask_head, mask_row, mask_step;  // step 0: one value for all keys of a row
  int32_t mask_keys;                                   // that the mask reaches
  int32_t dropped;                                     // rint(2^24 p); 0: none
  float kept_scale;                                    // 1 / (1 - p)
  uint64_t seed;
  float* scores;  // [batch][q_heads][tq][tk]
  int32_t score_kind;

  int64_t left, right, offset;
  int32_t batch, kv_head, valid;  // of the block; keys from `valid` on are hidden

  // Whether a score is its dot product scaled, and nobody else is to be told.
  INLINE bool plain() const {
    return mask_kind == kNone && softcap == 0.0f && score_kind == kNoScores && !q_scales;
  }
  INLINE int32_t row(int32_t v) const { return v / group; }
  INLINE int32_t head(int32_t v) const { return kv_head * group + v % group; }
  // The row of [batch][q_heads][tq].
  INLINE int64_t out_row(int32_t v) const {
    return (int64_t(batch) * kv_heads * group + head(v)) * tq + row(v);
  }
};

// Keys [low, high) that position and length let a vector see.
struct Extent {
  int32_t low, high;
};
INLINE Extent extent_of(const Task& t, int32_t v) {
  const int64_t own = t.row(v) + t.offset;
  return {clamp(own - t.left, t.tk), clamp(own + t.right + 1, t.valid)};
}

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

// The mask's value for a vector and key; booleans are 0 or -inf.
INLINE float mask_of(const Task& t, int32_t v, int32_t key) {
  const int64_t i =
      t.batch * t.mask_batch + t.head(v) * t.mask_head + t.row(v) * t.mask_row + key * t.mask_step;
  if (t.mask_kind == kBool) return static_cast<const uint8_t*>(t.mask)[i] ? 0.0f : -INFINITY_F;
  if (t.mask_kind == kMaskF32) return static_cast<const float*>(t.mask)[i];
  if (t.mask_kind == kMaskF16) return to_float(static_cast<const half_t*>(t.mask)[i]);
  return to_float(static_cast<const bfloat_t*>(t.mask)[i]);
}

// The score of a dot product; -inf where the key is not seen.
INLINE float score(const Task& t, int32_t v, int32_t key, bool in_reach, float dot) {
  float* to = t.score_kind ? t.scores + t.out_row(v) * t.tk + key : nullptr;
  float factor = t.scale;
  if (t.q_scales) {
    const int64_t k_vectors = int64_t(t.batch) * t.kv_heads + t.kv_head;
    const int64_t q_vectors = int64_t(t.batch) * t.kv_heads * t.group + t.head(v);
    dot = mul_rn(dot, t.k_scales[k_vectors * whole_words(t.tk) + key]);
    factor = mul_rn(t.q_scales[q_vectors * whole_words(t.tq) + t.row(v)], t.scale);
  }
  float x = mul_rn(dot, factor);
  if (t.score_kind == kRaw) *to = x;
  if (t.softcap > 0.0f) x = mul_rn(t.softcap, tanh_rn(div_rn(x, t.softcap)));
  if (t.score_kind == kSoftcap) *to = x;
  if (in_reach && t.mask_kind != kNone) {
    const float mask = mask_of(t, v, key);
    x = mask == -INFINITY_F ? mask : t.mask_kind == kBool ? x : add_rn(x, mask);
  }
  if (!in_reach) x = -INFINITY_F;
  if (t.score_kind >= kMask) *to = x;
  return x;
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
      float& x = own[r * kWeights + i * kLanes];
      x = in_reach || (scores_too && key < t.tk) ? score(t, v, key, in_reach, x) : -INFINITY_F;
    }
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      s[r][i] = State::vector(r) < tile.count ? own[r * kWeights + i * kLanes] : -INFINITY_F;
}

// Bit i: the weight of key `key` + 16 i is kept; word i of a counter is for tile i of a block.
INLINE uint32_t kept_of(const Task& t, int32_t v, int32_t key) {
  const uint32_t first = uint32_t(key / kBlockKeys * kLanes + key % kLanes);
  const Philox random = philox(first, uint32_t(t.row(v) + t.offset), t.head(v), t.seed);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    bits |= uint32_t(int32_t(random.words[i] >> 8) >= t.dropped) << i;
  return bits;
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
  __syncthreads();
  load_tile(at.kv, t.v.data, t.v.kind, kBlockKeys, min(kWide, t.dv - value_column),
            [&](int j) { return j < n ? value_row + j * t.v.row + value_column : int64_t(-1); });
  __syncthreads();
  state.add_values(at, max(tile.begin - start, 0), min(tile.end - start, n));
}

// grid (batch x tiles x parts, kv_heads x slices of kWide values), block kThreads.
template <int kEach, int kWide>
__global__ void __launch_bounds__(kThreads, 2)
    attention(const void* q, int32_t q_kind, int64_t q_batch, int64_t q_head, int64_t q_row,
              const void* k, int32_t k_kind, int64_t k_batch, int64_t k_head, int64_t k_row,
              const void* v, int32_t v_kind, int64_t v_batch, int64_t v_head, int64_t v_row,
              const float* q_scales, const float* k_scales, void* out,  // [batch][q_heads][tq][dv]
              int32_t out_kind,
              float* states,  // [batch][q_heads][tq][parts][state], or null: not split
              int32_t parts,  // chunks of keys that have a block each; 1: not split
              int32_t tq, int32_t tk, int32_t group, int32_t kv_heads, int32_t dk, int32_t dv,
              const int64_t* lengths,  // [batch] keys that exist, row 0 at length - tq; or null
              int64_t past, int64_t left, int64_t right, float scale, float softcap,
              const void* mask, int32_t mask_kind, int64_t mask_batch, int64_t mask_head,
              int64_t mask_row, int64_t mask_step, int32_t mask_keys,
              const uint64_t* seeds,  // [batch], or null: `seed` for all
              uint64_t seed, int32_t dropped, float kept_scale, float* scores, int32_t score_kind) {
  DYNAMIC_SHARED(bytes);
  constexpr int kVectors = FlashMemory<kEach>::kVectors, kChunk = ExactPart::kChunkKeys;
  using State = Flash<kEach, kWide>;
  const FlashMemory<kEach> at(bytes);
  Task t = {{q, q_kind, q_batch, q_head, q_row},
            {k, k_kind, k_batch, k_head, k_row},
            {v, v_kind, v_batch, v_head, v_row},
            q_scales,
            k_scales,
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
  t.batch = index / tiles, t.kv_head = blockIdx.y % kv_heads;
  if (seeds) t.seed = seeds[t.batch];
  t.valid = min(tk, mask_keys);
  if (lengths) {
    t.valid = min(t.valid, clamp(lengths[t.batch], tk));
    t.offset = lengths[t.batch] - tq;
  }
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
    const int64_t row = t.out_row(tile.first + State::vector(r));
    if (split) {
      float* to = states + (row * parts + part) * state_floats<ExactPart>(dv);
      total.store(r, to, value_column, dv);
      continue;
    }
#pragma unroll
    for (int i = 0; i < State::kColumns; ++i) {
      const int32_t column = value_column + State::column(i);
      if (column < dv) write(out, out_kind, row * dv + column, divided(total.o[r][i], sum));
    }
    if (t.score_kind != kSoftmax) continue;
    // This thread wrote these very scores.
    float* own = scores + row * tk;
    for (int32_t key = State::lane(); key < tk; key += kLanes) {
      const float x = own[key];
      own[key] = x == -INFINITY_F ? 0.0f : div_rn(exp_rn(sub_rn(x, total.m[r])), sum);
    }
  }
}
