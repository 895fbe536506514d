// Gradients of attention over arrays by recomputation in blocks (FlashAttention-2,
// arXiv:2307.08691), with the bits of csrc/attention/backward.h:
//
//   p[j]  = exp(s[j] - m) * (1 / l)        w[j] = p[j] kept / (1 - dropout_p)
//   D     = d_out . out                    sequential FMA in 16 lanes, one tree
//   ds[j] = p[j] ((d_out . v[j]) kept / (1 - dropout_p) - D) (1 - tanh^2(raw[j] / softcap)) scale
//   dq    = sum ds[j] k[j]                 over keys, ascending
//   dk[j] = sum ds[j] q                    over rows ascending, in each the heads of the group
//   dv[j] = sum w[j] d_out                 likewise
//
// One kernel serves both directions. A block owns some vectors (or keys), whose rows stand in
// shared memory, and blocks of 64 keys (or vectors) pass: their dot products give w and ds, and
// these times the rows that pass are added to what the block owns.
#include "dense.cuh"

// Weight of a pair that is not seen: no arithmetic gives a signalling NaN.
constexpr int32_t kHidden = 0x7f800001;

// D of each row, beside m and 1 / l. A group of 16 threads a row; grid ceil(rows / 8).
__global__ void __launch_bounds__(kThreads)
    row_products(const void* d_out, int32_t d_kind, int64_t d_batch, int64_t d_head, int64_t d_row,
                 const float* out, int64_t out_batch, int64_t out_head, int64_t out_row,
                 float* stats,  // [batch][heads][tq][4]
                 int64_t rows, int32_t heads, int32_t tq, int32_t dv) {
  const int64_t row = int64_t(blockIdx.x) * kGroups + threadIdx.x / kLanes;
  const bool is_there = row < rows;
  const int64_t b = row / tq / heads, h = row / tq % heads, r = row % tq;
  const int64_t from = b * d_batch + h * d_head + r * d_row;
  const int64_t to = b * out_batch + h * out_head + r * out_row;
  float sum = 0.0f;
  for (int32_t d = threadIdx.x % kLanes; is_there && d < dv; d += kLanes) {
    const float grad = d_kind == kF32   ? static_cast<const float*>(d_out)[from + d]
                       : d_kind == kF16 ? to_float(static_cast<const half_t*>(d_out)[from + d])
                                        : to_float(static_cast<const bfloat_t*>(d_out)[from + d]);
    sum = fma_rn(out[to + d], grad, sum);
  }
  sum = sum_of_lanes<kLanes>(sum);
  if (is_there && threadIdx.x % kLanes == 0 && stats[4 * row + 1] != 0.0f) stats[4 * row + 2] = sum;
}

// Element offset of a vector's row, and of a key's.
INLINE int64_t row_of_vector(const Task& t, const Rows& from, int32_t v) {
  return t.batch * from.batch + t.head(v) * from.head + t.row(v) * from.row;
}
INLINE int64_t row_of_key(const Task& t, const Rows& from, int32_t key) {
  return t.batch * from.batch + t.kv_head * from.head + key * from.row;
}

// float32 gradients; strides in elements.
struct Sums {
  float* data;
  int64_t batch, head, row;
};

// What a block owns, `count` rows of it from `first` on, and what passes, [begin, end).
template <bool kByKeys>
struct Walk {
  int32_t first, count, begin, end;
  INLINE int32_t vector(int own, int32_t passing) const { return kByKeys ? passing : first + own; }
  INLINE int32_t key(int own, int32_t passing) const { return kByKeys ? first + own : passing; }
};

template <int kEach>
struct BackwardMemory {              // dynamic shared memory
  FlashMemory<kEach> first, second;  // own rows of q (or k), then of d_out (or v); the rest shared
  float *w, *ds;                     // [kVectors][kWeights]
  INLINE explicit BackwardMemory(uint8_t* bytes) : first(bytes), second(bytes) {
    constexpr int kVectors = FlashMemory<kEach>::kVectors;
    second.q = first.p + kVectors * kWeights;
    ds = first.p, w = second.q + kVectors * kRow;
  }
};

// dots[r][i] = the block's own row r . passing row i of `own` and `passing`, `size` wide.
template <bool kByKeys, int kEach>
INLINE void multiply(const Task& t, const Walk<kByKeys>& walk, const FlashMemory<kEach>& at,
                     const Rows& vectors, const Rows& keys, int32_t size, int32_t start, bool again,
                     float (&dots)[kEach][kTiles]) {
  const int32_t n = min(kBlockKeys, walk.end - start);
  const Rows &own = kByKeys ? keys : vectors, &passing = kByKeys ? vectors : keys;
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int i = 0; i < kTiles; ++i) dots[r][i] = 0.0f;
  for (int32_t d = 0; d < size; d += kSlice) {
    const int width = min(kSlice, size - d);
    __syncthreads();
    if (again || size > kSlice)
      load_tile(at.q, own.data, own.kind, FlashMemory<kEach>::kVectors, width, [&](int i) {
        if (i >= walk.count) return int64_t(-1);
        return d + (kByKeys ? row_of_key(t, own, walk.first + i)
                            : row_of_vector(t, own, walk.first + i));
      });
    load_tile(at.kv, passing.data, passing.kind, kBlockKeys, width, [&](int i) {
      if (i >= n) return int64_t(-1);
      return d +
             (kByKeys ? row_of_vector(t, passing, start + i) : row_of_key(t, passing, start + i));
    });
    __syncthreads();
    Flash<kEach, 64>::add_dots(at, width, dots);
  }
}

// This thread's pairs: from the dot products of q and k (in ds) and of d_out and v (in w) to ds and
// w.
template <bool kByKeys, int kEach>
INLINE void differentiate(const Task& t, const Walk<kByKeys>& walk, const float* stats,
                          int32_t start, const BackwardMemory<kEach>& at) {
  using State = Flash<kEach, 64>;
#pragma unroll 1
  for (int at_pair = 0; at_pair < kEach * kTiles; ++at_pair) {
    const int own = State::vector(at_pair / kTiles);
    const int32_t passing = start + State::key(at_pair % kTiles);
    const int cell = own * kWeights + State::key(at_pair % kTiles);
    float w = __int_as_float(kHidden), ds = w;
    if (own < walk.count && passing < walk.end) {
      const int32_t v = walk.vector(own, passing), key = walk.key(own, passing);
      const Extent extent = extent_of(t, v);
      float slope;
      const float s = key >= extent.low && key < extent.high
                          ? score(t, v, key, true, at.ds[cell], slope)
                          : -INFINITY_F;
      if (s != -INFINITY_F) {
        const float4 row = *reinterpret_cast<const float4*>(stats + 4 * t.out_row(v));
        const float p = mul_rn(exp_rn(sub_rn(s, row.x)), row.y);
        float x = at.w[cell];
        w = p;
        if (t.dropped != 0) {
          const bool kept = kept_of(t, v, key) >> (key / kLanes % kTiles) & 1;
          x = kept ? mul_rn(x, t.kept_scale) : 0.0f;
          w = kept ? mul_rn(p, t.kept_scale) : 0.0f;
        }
        x = mul_rn(p, sub_rn(x, row.z));
        if (t.softcap > 0.0f) x = mul_rn(x, slope);
        ds = mul_rn(x, t.scale);
      }
    }
    at.w[cell] = w, at.ds[cell] = ds;
  }
}

// sums[r] += weights[r][i] times passing row i, i ascending, hidden ones skipped.
template <int kEach, int kColumns>
INLINE void add_passing(const float* weights, const float* rows, float (&sums)[kEach][kColumns]) {
  using State = Flash<kEach, kColumns * kLanes>;
#pragma unroll 2
  for (int j = 0; j < kBlockKeys; ++j) {
    float v[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; i += 4)
      *reinterpret_cast<float4*>(v + i) =
          *reinterpret_cast<const float4*>(rows + j * kRow + State::column(i));
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const float weight = weights[State::vector(r) * kWeights + j];
      if (__float_as_int(weight) == kHidden) continue;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[r][i] = fma_rn(weight, v[i], sums[r][i]);
    }
  }
}

// Columns [column, column + kWide) of what passes, added by `weights`. The tile has them already
// where they are `resident`: the last product's operand, not wider than a slice.
template <bool kByKeys, int kEach, int kWide>
INLINE void accumulate(const Task& t, const Walk<kByKeys>& walk, const BackwardMemory<kEach>& at,
                       const float* weights, const Rows& passing, int32_t size, int32_t column,
                       bool resident, int32_t start, float (&sums)[kEach][kWide / kLanes]) {
  const int32_t n = min(kBlockKeys, walk.end - start);
  if (column >= size) return;
  __syncthreads();
  if (!resident) {
    load_tile(at.first.kv, passing.data, passing.kind, kBlockKeys, min(kWide, size - column),
              [&](int i) {
                if (i >= n) return int64_t(-1);
                return column + (kByKeys ? row_of_vector(t, passing, start + i)
                                         : row_of_key(t, passing, start + i));
              });
    __syncthreads();
  }
  add_passing<kEach, kWide / kLanes>(weights, at.first.kv, sums);
}

// The block's own sums between memory and registers.
template <bool kByKeys, int kEach, int kWide, class Each>
INLINE void each_sum(const Task& t, const Walk<kByKeys>& walk, const Sums& to, int32_t size,
                     int32_t column, Each each) {
  using State = Flash<kEach, kWide>;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    if (State::vector(r) >= walk.count) continue;
    const int32_t own = walk.first + State::vector(r);
    const int64_t head = kByKeys ? t.kv_head : t.head(own), row = kByKeys ? own : t.row(own);
    float* data = to.data + t.batch * to.batch + head * to.head + row * to.row;
#pragma unroll
    for (int i = 0; i < State::kColumns; ++i)
      if (column + State::column(i) < size) each(r, i, data[column + State::column(i)]);
  }
}

// Vectors of the kv head that position may let see one of the block's keys.
template <int kEach>
INLINE void vectors_of(const Task& t, Walk<true>& walk) {
  const int64_t low = walk.first - t.right - t.offset;
  const int64_t high = walk.first + walk.count + t.left - t.offset, count = t.tq;
  walk.begin = int32_t(low < 0 ? 0 : low > count ? count : low) * t.group;
  walk.end = walk.first >= t.valid ? 0 : clamp(high, t.tq) * t.group;
}

// kByKeys: dk and dv are added to, else dq is written. grid (batch x tiles, kv_heads x slices of
// kWide columns), block kThreads.
template <bool kByKeys, int kEach, int kWide>
__global__ void __launch_bounds__(kThreads, 2) attention_backward(
    const void* q, int32_t q_kind, int64_t q_batch, int64_t q_head, int64_t q_row, const void* k,
    int32_t k_kind, int64_t k_batch, int64_t k_head, int64_t k_row, const void* v, int32_t v_kind,
    int64_t v_batch, int64_t v_head, int64_t v_row, const void* d_out, int32_t d_kind,
    int64_t d_batch, int64_t d_head, int64_t d_row, float* first_sums, int64_t first_batch,
    int64_t first_head, int64_t first_row,                              // dq or dk
    float* dv_sums, int64_t dv_batch, int64_t dv_head, int64_t dv_row,  // null for dq
    const float* stats,  // [batch][q_heads][tq][4]: m, 1 / l, D
    int32_t tq, int32_t tk, int32_t group, int32_t kv_heads, int32_t dk, int32_t dv,
    const int64_t* lengths, int64_t past, int64_t left, int64_t right, float scale, float softcap,
    const void* mask, int32_t mask_kind, int64_t mask_batch, int64_t mask_head, int64_t mask_row,
    int64_t mask_step, int32_t mask_keys, const uint64_t* seeds, uint64_t seed, uint64_t seed_step,
    int32_t dropped, float kept_scale) {
  DYNAMIC_SHARED(bytes);
  constexpr int kVectors = FlashMemory<kEach>::kVectors, kColumns = kWide / kLanes;
  const BackwardMemory<kEach> at(bytes);
  Task t = {{q, q_kind, q_batch, q_head, q_row},
            {k, k_kind, k_batch, k_head, k_row},
            {v, v_kind, v_batch, v_head, v_row},
            nullptr,
            nullptr,
            nullptr,
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
            nullptr,
            kNoScores,
            left,
            right,
            past};
  const Rows gradient = {d_out, d_kind, d_batch, d_head, d_row};
  const int32_t total = kByKeys ? tk : tq * group, tiles = (total + kVectors - 1) / kVectors;
  settle(t, blockIdx.x / tiles, blockIdx.y % kv_heads, lengths, seeds, seed_step);
  const int32_t column = blockIdx.y / kv_heads * kWide;
  Walk<kByKeys> walk;
  walk.first = blockIdx.x % tiles * kVectors;
  walk.count = min(kVectors, total - walk.first);
  if constexpr (kByKeys) {
    vectors_of<kEach>(t, walk);
  } else {
    walk.begin = extent_of(t, walk.first).low / kBlockKeys * kBlockKeys;
    walk.end = extent_of(t, walk.first + walk.count - 1).high;
  }
  const Sums first_to = {first_sums, first_batch, first_head, first_row};
  const Sums dv_to = {dv_sums, dv_batch, dv_head, dv_row};

  float first[kEach][kColumns] = {}, second[kEach][kColumns] = {};
  if (kByKeys) {
    each_sum<kByKeys, kEach, kWide>(t, walk, first_to, dk, column,
                                    [&](int r, int i, float& x) { first[r][i] = x; });
    each_sum<kByKeys, kEach, kWide>(t, walk, dv_to, dv, column,
                                    [&](int r, int i, float& x) { second[r][i] = x; });
  }
  for (int32_t start = walk.begin; start < walk.end; start += kBlockKeys) {
    using State = Flash<kEach, kWide>;
    const bool again = start == walk.begin;
    float dots[kEach][kTiles];
    multiply<kByKeys, kEach>(t, walk, at.second, gradient, t.v, dv, start, again, dots);
    const int own = State::vector(0) * kWeights + State::lane();
#pragma unroll
    for (int r = 0; r < kEach; ++r)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) at.w[own + r * kWeights + i * kLanes] = dots[r][i];
    multiply<kByKeys, kEach>(t, walk, at.first, t.q, t.k, dk, start, again, dots);
#pragma unroll
    for (int r = 0; r < kEach; ++r)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) at.ds[own + r * kWeights + i * kLanes] = dots[r][i];
    differentiate<kByKeys, kEach>(t, walk, stats, start, at);
    accumulate<kByKeys, kEach, kWide>(t, walk, at, at.ds, kByKeys ? t.q : t.k, dk, column,
                                      dk <= kSlice, start, first);
    if (kByKeys)
      accumulate<kByKeys, kEach, kWide>(t, walk, at, at.w, gradient, dv, column, false, start,
                                        second);
  }
  // Adding + 0 makes every zero positive.
  each_sum<kByKeys, kEach, kWide>(t, walk, first_to, dk, column,
                                  [&](int r, int i, float& x) { x = add_rn(first[r][i], 0.0f); });
  if (kByKeys)
    each_sum<kByKeys, kEach, kWide>(t, walk, dv_to, dv, column, [&](int r, int i, float& x) {
      x = add_rn(second[r][i], 0.0f);
    });
}
