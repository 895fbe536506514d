// Causal attention over a cache in half precision (flash_half.cuh): T is half or bfloat16, kWidth
// what dk and dv are padded to. q is rounded to T, and so are keys and values of another type,
// int8 ones after their scale.
//
// A block has 16 query vectors a warp, of one sequence and kv head: vector v is query head v %
// group of row v / group. It goes over all chunks of 256 keys, or, split, over one of them, whose
// states merge_rows merges; the bits are the same. While one block of 64 keys is worked on, the
// next comes.
#include "flash_half.cuh"
#include "merge_rows.cuh"

constexpr int kMostWarps = 4;

INLINE float to_float(int8_t a) { return to_float(int32_t(a)); }

// Eight numbers from `from` on, rounded to T, those from `n` on zero.
template <class T, class From>
INLINE Words4 rounded8(const From* from, int n, float scale) {
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < n ? mul_rn(to_float(from[i]), scale) : 0.0f;
  return {{pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]), pack_pair<T>(x[4], x[5]),
           pack_pair<T>(x[6], x[7])}};
}

enum Kind : int32_t { kF32, kF16, kBf16, kI8 };

struct Vectors {  // keys or values of one layer
  const void* data;
  const float* scales;  // int8 only
  int32_t kind, size, width;
};

// Rows [base, base + valid) of `from` into a tile, zeros after them and past `size`. kAsync: they
// are T already and are copied by the copy units.
template <class T, int kWidth, bool kAsync>
INLINE void load_tile(uint8_t* tile, const Vectors& from, int64_t base, int valid) {
  constexpr int kWords = kWidth / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < kBlockKeys * kWords; i += blockDim.x) {
    const int row = i / kWords, first = i % kWords * 8;
    const int n = row < valid ? min(8, from.size - first) : 0;
    uint8_t* to = tile + word_offset<kWidth>(row, i % kWords);
    const int64_t at = (base + row) * from.width + first;
    if (kAsync) {
      copy_async(to, static_cast<const T*>(from.data) + at, n > 0);
      continue;
    }
    Words4 words = {};
    if (n > 0) {
      if (from.kind == kF32)
        words = rounded8<T>(static_cast<const float*>(from.data) + at, n, 1.0f);
      else if (from.kind == kF16)
        words = rounded8<T>(static_cast<const half_t*>(from.data) + at, n, 1.0f);
      else
        words = rounded8<T>(static_cast<const int8_t*>(from.data) + at, n, from.scales[base + row]);
    }
    *reinterpret_cast<Words4*>(to) = words;
  }
}

// The fragments of a warp's queries; rows that are null are zero.
template <class T, int kSteps>
INLINE void load_queries(uint32_t (&q)[kSteps][4], const float* const (&row)[2], int32_t dk) {
  const auto pair = [&](int h, int d) {
    const float low = row[h] && d < dk ? row[h][d] : 0.0f;
    const float high = row[h] && d + 1 < dk ? row[h][d + 1] : 0.0f;
    return pack_pair<T>(low, high);
  };
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      q[step][i] = pair(i % 2, 16 * step + 8 * (i / 2) + threadIdx.x % 4 * 2);
}

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
  const Vectors k = {keys, key_scales, kind, dk, key_width};
  const Vectors v = {values, value_scales, kind, dv, value_width};
  const int32_t sequence = blockIdx.z, kv_head = blockIdx.y, warp = threadIdx.x / 32;
  const SequenceRows rows = rows_of(starts, lengths, active, sequence);
  // The last tiles have the most keys: they go first.
  const int32_t part = blockIdx.x % parts, tiles = gridDim.x / parts;
  const int32_t vectors = kWarpVectors * (blockDim.x / 32);
  const int32_t first = (tiles - 1 - int32_t(blockIdx.x) / parts) * vectors;
  const int32_t count = rows.count * group;  // of the whole sequence
  if (first >= count) return;
  const auto position = [&](int32_t vector) { return rows.held + vector / group; };
  // Replays of a captured step past the cache's end read what is there.
  const int32_t newest =
      min(position(min(first + vectors, count) - 1), pages_each * page_tokens - 1);
  const int32_t oldest = lowest_key(position(first), left);

  // This warp's vectors, and the keys that any of them sees.
  const int32_t own = first + warp * kWarpVectors;
  const int32_t own_low = lowest_key(position(own), left);
  const int32_t own_high = own < count ? position(min(own + kWarpVectors, count) - 1) + 1 : 0;
  int32_t low[2], high[2];
  const float* row[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t vector = own + State::vector(h);
    low[h] = lowest_key(position(vector), left);
    high[h] = vector < count ? position(vector) + 1 : 0;
    row[h] = vector < count ? q + (rows.first + vector / group) * q_stride +
                                  int64_t(kv_head * group + vector % group) * dk
                            : nullptr;
  }
  uint32_t queries[State::kSteps][4];
  load_queries<T>(queries, row, dk);

  const bool split = states != nullptr;
  const int32_t begin = max(oldest, split ? part * kChunk : 0) / kBlockKeys * kBlockKeys;
  const int32_t end = split ? min(newest + 1, (part + 1) * kChunk) : newest + 1;
  const auto load = [&](int32_t start, int stage) {
    const int64_t base = page_row(pages, sequence, kv_head, start);
    const int valid = min(kBlockKeys, newest + 1 - start);
    uint8_t* tile = bytes + stage * 2 * kTileBytes;
    load_tile<T, kWidth, kAsync>(tile, k, base, valid);
    load_tile<T, kWidth, kAsync>(tile + kTileBytes, v, base, valid);
    copy_async_commit();
  };
  State state;
  state.clear();
  HalfTotal<T, kWidth> total(bytes + 4 * kTileBytes);
  if (begin < end) load(begin, 0);
  for (int32_t start = begin, stage = 0; start < end; start += kBlockKeys, stage ^= 1) {
    if (start + kBlockKeys < end) {
      load(start + kBlockKeys, stage ^ 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    const uint8_t* tile = bytes + stage * 2 * kTileBytes;
    if (start < own_high && start + kBlockKeys > own_low)
      state.visit(tile, tile + kTileBytes, queries, scale, start, low, high);
    if ((start + kBlockKeys) % kChunk == 0 || start + kBlockKeys >= end) {
      total.merge(state);
      state.clear();
    }
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = sum_of_lanes<HalfPart::kLanes>(total.l[h]);
    const int32_t vector = own + State::vector(h);
    if (vector >= count) continue;
    const int64_t at = rows.first + vector / group;
    const int32_t head = kv_head * group + vector % group;
    if (split) {
      const int64_t index = (at * kv_heads * group + head) * parts + part;
      total.store(h, states + index * state_floats<HalfPart>(dv), dv);
    } else {
      total.write(h, out + at * out_stride + int64_t(head) * dv, dv, sum);
    }
  }
}
