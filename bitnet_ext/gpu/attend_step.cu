// One more row of each sequence: its queries and key turned by its position, key and value put into
// the cache, and attention over all keys, in one launch and with the bits of append_rows and
// attend_rows (kv_append.cu, attend.cu).
//
//   s[j] = (q . k[j]) * scale          int8: (dot * key_scale[j]) * scale
//   out  = softmax(s) v                int8: each weight times value_scale[j] first
//
// The row at `position` sees keys [position - left, position]. A block takes a chunk of 512 keys of
// one kv head, up to 8 of its query heads and 128 columns of values; the last of a row's chunks to
// end merges the states of all in order. A chunk's keys and values pass through kStages stages of
// shared memory, as they lie in the cache: 64 rows of 128 elements each, three stages ahead.
//
//   scores   a thread has a key and two vectors: a sequential FMA over dk
//   weights  a warp has a vector: flash.cuh has the formulas and the order
//   values   a thread has a column and four vectors: a sequential FMA over keys
#include "async.cuh"
#include "flash.cuh"
#include "paged.cuh"
#include "turned.cuh"

constexpr int kWarps = 8, kMostVectors = 8, kStepThreads = 32 * kWarps;
constexpr int kScores = kBlockKeys + 4;

INLINE int32_t thread_of_block() { return 32 * threadIdx.y + threadIdx.x; }

// 16 bytes of elements as floats.
INLINE void unpack(const float* from, float (&x)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
INLINE void unpack(const half_t* from, float (&x)[8]) {
  const Words4 v = *reinterpret_cast<const Words4*>(from);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float(half_t{uint16_t(v.x[i / 2] >> i % 2 * 16)});
}
INLINE void unpack(const int8_t* from, float (&x)[16]) {
  const Words4 v = *reinterpret_cast<const Words4*>(from);
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = to_float(int8_t(v.x[i / 4] >> i % 4 * 8));
}

template <class T>
struct Layer {  // of the cache
  Pages pages;
  T *keys, *values;
  float *key_scales, *value_scales;
  int32_t dk, dv, key_width, value_width;
};

// A block's work.
struct Work {
  int32_t sequence, kv_head, first, count;  // query heads [first, first + count) of the group
  int32_t column, columns;                  // of the values
  int32_t oldest, newest, begin, end;       // keys that the row sees; this block's, begin at a 64th
  int32_t fresh;                            // the row's own key where this block has it, or -1
};

template <class T>
struct Memory {                                                          // dynamic shared memory
  static constexpr int kEach = 16 / sizeof(T), kPitch = kSlice + kEach;  // elements
  static constexpr int kStage = kBlockKeys * kPitch;
  T* stages;           // [stages][kBlockKeys][kPitch]: rows of one stage begin in different banks
  T *key, *value;      // the row's own: [key_width], [value_width]
  float* q;            // [kMostVectors][q_pitch]
  float* scores;       // [kMostVectors][kScores], then the weights, negative for a hidden key
  float* value_scale;  // [kBlockKeys]
  float* change;       // [kMostVectors], by which the states of earlier keys are multiplied
  float* own_scales;   // of the row's own key and value
  int32_t q_pitch;

  INLINE Memory(uint8_t* bytes, int stages_count, const Layer<T>& layer) {
    q_pitch = (layer.dk + 15) / 16 * 16;
    stages = reinterpret_cast<T*>(bytes);
    key = stages + stages_count * kStage;
    value = key + layer.key_width;
    q = reinterpret_cast<float*>(value + layer.value_width);
    scores = q + kMostVectors * q_pitch;
    value_scale = scores + kMostVectors * kScores;
    change = value_scale + kBlockKeys;
    own_scales = change + kMostVectors;
  }
};

// Start to copy one stage: a slice of the keys of a block of keys, or, after the last, its values.
template <class T>
INLINE void fetch(const Layer<T>& layer, const Work& work, T* stage, int32_t start, int32_t slice) {
  constexpr int kEach = Memory<T>::kEach, kWords = kSlice / kEach;
  const bool is_key = slice * kSlice < layer.dk;
  const int32_t width = is_key ? layer.key_width : layer.value_width;
  const int32_t column = is_key ? slice * kSlice : work.column;
  const int64_t base = page_row(layer.pages, work.sequence, work.kv_head, start);
  const T* from = (is_key ? layer.keys : layer.values) + base * width + column;
  // The row's own is not read from the cache, where it may not be yet.
  const int32_t valid = (work.fresh >= 0 ? work.fresh : work.end) - start;
  for (int32_t i = thread_of_block(); i < kBlockKeys * kWords; i += kStepThreads) {
    const int32_t j = i / kWords, at = i % kWords * kEach;
    if (column + at >= width) continue;
    copy_async(stage + j * Memory<T>::kPitch + at, j < valid ? from + j * width + at : from,
               j < valid);
  }
}

// The queries, turned, and the row's own key and value as the cache has them; `keep`: there too.
template <class T>
INLINE void prepare(const Layer<T>& layer, const Work& work, const Memory<T>& at, const float* row,
                    const float* cos, const float* sin, int32_t group, bool keep) {
  const int32_t warp = threadIdx.y, half = layer.dk / 2, q_heads = layer.pages.kv_heads * group;
  if (warp < work.count) {
    const int32_t head = work.kv_head * group + work.first + warp;
    const Turned q = {row + int64_t(head) * layer.dk, cos, sin, half};
    for (int32_t i = threadIdx.x; i < at.q_pitch; i += 32)
      at.q[warp * at.q_pitch + i] = i < layer.dk ? q(i) : 0.0f;
  }
  if (work.fresh < 0 || warp < kWarps - 4) return;
  row += int64_t(q_heads) * layer.dk;
  const int64_t to = page_row(layer.pages, work.sequence, work.kv_head, work.fresh);
  const Turned k = {row + int64_t(work.kv_head) * layer.dk, cos, sin, half};
  row += int64_t(layer.pages.kv_heads) * layer.dk;
  const Turned v = {row + int64_t(work.kv_head) * layer.dv, nullptr, nullptr, 0};
  if (warp == kWarps - 4) put(k, layer.dk, at.key, layer.key_width, at.own_scales);
  if (warp == kWarps - 3) put(v, layer.dv, at.value, layer.value_width, at.own_scales + 1);
  if (!keep) return;
  if (warp == kWarps - 2)
    put(k, layer.dk, layer.keys + to * layer.key_width, layer.key_width, layer.key_scales + to);
  if (warp == kWarps - 1)
    put(v, layer.dv, layer.values + to * layer.value_width, layer.value_width,
        layer.value_scales + to);
}

// dots[r] += vector . key over a slice of n dimensions, for this thread's key and vectors v, v + 4.
template <class T>
INLINE void add_dots(const T* key, const float* q, int32_t q_pitch, int32_t vectors, int32_t n,
                     float (&dots)[2]) {
  constexpr int kEach = Memory<T>::kEach;
#pragma unroll 4
  for (int32_t d = 0; d < n; d += kEach) {
    float k[kEach];
    unpack(key + d, k);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r >= vectors) break;
#pragma unroll
      for (int e = 0; e < kEach; e += 4) {
        const float4 x = *reinterpret_cast<const float4*>(q + 4 * r * q_pitch + d + e);
        dots[r] = fma_rn(x.x, k[e], dots[r]);
        dots[r] = fma_rn(x.y, k[e + 1], dots[r]);
        dots[r] = fma_rn(x.z, k[e + 2], dots[r]);
        dots[r] = fma_rn(x.w, k[e + 3], dots[r]);
      }
    }
  }
}

// A warp's vector: its scores become weights, its m and l move on. Both halves of the warp do the
// same. `low`, `high`: keys of the block that are seen.
INLINE void soften(float* scores, const float* value_scale, int32_t low, int32_t high,
                   float* change, float& m, float& l) {
  const int32_t lane = threadIdx.x % kLanes;
  float s[kTiles], top = -INFINITY_F;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int32_t j = kLanes * t + lane;
    s[t] = scores[j];
    if (j >= low && j < high) top = max_num(top, s[t]);
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    top = max_num(top, __shfl_xor_sync(0xffffffffu, top, offset));
  const float next = m > top ? m : top, by = exp_rn(sub_rn(m, next));
  m = next;
  l = mul_rn(l, by);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int32_t j = kLanes * t + lane;
    const bool is_visible = j >= low && j < high;
    const float weight = is_visible ? exp_rn(sub_rn(s[t], m)) : 0.0f;
    l = add_rn(l, weight);
    scores[j] = is_visible ? mul_rn(weight, value_scale[j]) : -1.0f;
  }
  *change = by;
}

// o[r] of vectors v, v + 2, v + 4, v + 6 at this thread's column; key own_key stands in `own`.
template <class T>
INLINE void add_values(const T* stage, const T* own, int32_t own_key, const float* weights,
                       const float* change, int32_t vectors, int32_t low, int32_t high,
                       float (&o)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r)
    if (r < vectors) o[r] = mul_rn(o[r], change[2 * r]);
  for (int32_t j = low / 4 * 4; j < high; j += 4) {
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      v[e] = to_float(j + e == own_key ? *own : stage[(j + e) * Memory<T>::kPitch]);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (r >= vectors) break;
      const float4 p = *reinterpret_cast<const float4*>(weights + 2 * r * kScores + j);
      if (!(p.x < 0.0f)) o[r] = fma_rn(p.x, v[0], o[r]);
      if (!(p.y < 0.0f)) o[r] = fma_rn(p.y, v[1], o[r]);
      if (!(p.z < 0.0f)) o[r] = fma_rn(p.z, v[2], o[r]);
      if (!(p.w < 0.0f)) o[r] = fma_rn(p.w, v[3], o[r]);
    }
  }
}

// This block's part of the states: m and l of a warp's vector, o of a thread's column and vectors.
struct Part {
  float m, l, o[4];
};

template <class T, int kStages>
INLINE Part attend(const Layer<T>& layer, const Work& work, const Memory<T>& at, const float* row,
                   const float* cos, const float* sin, int32_t group, bool keep, float scale) {
  const int32_t slices = (layer.dk + kSlice - 1) / kSlice, each = slices + 1;
  const int32_t items = (work.end - work.begin + kBlockKeys - 1) / kBlockKeys * each;
  const auto start_copy = [&](int32_t item) {
    if (item < items)
      fetch(layer, work, at.stages + item % kStages * Memory<T>::kStage,
            work.begin + item / each * kBlockKeys, item % each);
    copy_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) start_copy(i);
  prepare(layer, work, at, row, cos, sin, group, keep);

  int32_t item = 0;
  // The next stage is here for all, and the one before it free.
  const auto next_stage = [&] {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    start_copy(item + kStages - 1);
    return at.stages + item++ % kStages * Memory<T>::kStage;
  };
  const int32_t thread = thread_of_block(), key = thread % kBlockKeys, first = thread / kBlockKeys;
  const int32_t column = thread % kSlice, value_first = thread / kSlice;
  Part part = {-INFINITY_F, 0.0f, {}};
  for (int32_t start = work.begin; start < work.end; start += kBlockKeys) {
    const bool is_own = start + key == work.fresh, exists = start + key < work.end;
    const bool scaled = sizeof(T) == 1 && exists && !is_own;
    const int64_t base = page_row(layer.pages, work.sequence, work.kv_head, start) + key;
    float key_scale = scaled ? layer.key_scales[base] : 1.0f;
    float value_scale = scaled ? layer.value_scales[base] : 1.0f;
    float dots[2] = {};
    for (int32_t slice = 0; slice < slices; ++slice) {
      const T* stage = next_stage();
      const T* from = is_own ? at.key + slice * kSlice : stage + key * Memory<T>::kPitch;
      if (first < work.count)
        add_dots(from, at.q + first * at.q_pitch + slice * kSlice, at.q_pitch,
                 (work.count - first + 3) / 4, min(kSlice, layer.dk - slice * kSlice), dots);
    }
    if (sizeof(T) == 1 && is_own) key_scale = at.own_scales[0], value_scale = at.own_scales[1];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      at.scores[(first + 4 * r) * kScores + key] = mul_rn(mul_rn(dots[r], key_scale), scale);
    if (first == 0) at.value_scale[key] = value_scale;
    __syncthreads();
    const int32_t low = max(work.oldest - start, 0), high = min(work.end - start, kBlockKeys);
    const int32_t warp = threadIdx.y;
    if (warp < work.count)
      soften(at.scores + warp * kScores, at.value_scale, low, high, at.change + warp, part.m,
             part.l);
    const T* stage = next_stage();
    if (column < work.columns && value_first < work.count)
      add_values(stage + column, at.value + work.column + column, work.fresh - start,
                 at.scores + value_first * kScores, at.change + value_first,
                 (work.count - value_first + 1) / 2, low, high, part.o);
  }
  copy_async_wait<0>();
  __syncthreads();
  return part;
}

// state(v) is where the state of vector v goes.
template <class StateOf>
INLINE void store(const Part& part, const Work& work, StateOf state) {
  const int32_t column = thread_of_block() % kSlice, first = thread_of_block() / kSlice;
  if (threadIdx.y < work.count) {
    float* to = state(threadIdx.y);
    if (threadIdx.x == 0) to[0] = part.m;
    if (threadIdx.x < kLanes) to[1 + threadIdx.x] = part.l;
  }
  if (column < work.columns)
#pragma unroll
    for (int r = 0; r < 4; ++r)
      if (first + 2 * r < work.count) state(first + 2 * r)[1 + kLanes + column] = part.o[r];
}

// out(v) from the states [chunk] of each vector, at states(v).
template <class StatesOf, class OutOf>
INLINE void merge(const Work& work, int32_t first, int32_t last, StatesOf states, OutOf out) {
  const int32_t column = thread_of_block() % kSlice;
  for (int32_t v = thread_of_block() / kSlice; v < work.count; v += kStepThreads / kSlice)
    merge_states<ExactPart>(states(v), first, last, column, work.columns,
                            [&](float x) { out(v)[column] = x; });
}

// grid (tiles of query heads x parts, kv_heads x slices of 128 values, sequences), block (32, 8)
template <class T, int kStages>
__global__ void __launch_bounds__(kStepThreads, 1)
    attend_step(const float* qkv,  // [sequences][q_heads dk | kv_heads dk | kv_heads dv]
                int64_t stride,    // floats from a row to the next
                float* out,        // [sequences][out_stride], query head h at h dv
                int64_t out_stride,
                float* states,     // [sequences][q_heads][slices][parts][state], or null: one part
                int32_t* tickets,  // [sequences][kv_heads][slices][tiles], zero
                int32_t parts,     // chunks of the longest sequence
                const float* cos, const float* sin,  // [positions][dk / 2], or null
                int32_t positions,                   // that cos, or else the cache, has room for
                const int32_t* lengths, const uint8_t* active, const int32_t* table,
                int32_t pages_each, int32_t page_tokens, T* keys, T* values, float* key_scales,
                float* value_scales, int32_t group, int32_t kv_heads, int32_t dk, int32_t dv,
                int32_t key_width, int32_t value_width, int32_t left, float scale) {
  DYNAMIC_SHARED(bytes);
  constexpr int kChunk = ExactPart::kChunkKeys;
  const Layer<T> layer = {{table, pages_each, page_tokens, kv_heads},
                          keys,
                          values,
                          key_scales,
                          value_scales,
                          dk,
                          dv,
                          key_width,
                          value_width};
  const int32_t part = blockIdx.x % parts, tile = blockIdx.x / parts;
  const int32_t slice = blockIdx.y / kv_heads, slices = gridDim.y / kv_heads;
  Work work;
  work.sequence = blockIdx.z, work.kv_head = blockIdx.y % kv_heads;
  work.first = tile * kMostVectors, work.count = min(kMostVectors, group - work.first);
  work.column = slice * kSlice, work.columns = min(kSlice, dv - work.column);
  const int32_t q_heads = kv_heads * group, head = work.kv_head * group + work.first;
  const auto out_of = [&](int32_t v) {
    return out + work.sequence * out_stride + int64_t(head + v) * dv + work.column;
  };
  if (active && !active[work.sequence]) {
    for (int32_t i = thread_of_block(); part == 0 && i < work.count * work.columns;
         i += kStepThreads)
      out_of(i / work.columns)[i % work.columns] = 0.0f;
    return;
  }
  const int32_t position = lengths[work.sequence];
  const bool has_room = position < positions;
  // Replays of a captured step past the cache's end read what is there.
  work.newest = min(position, pages_each * page_tokens - 1);
  work.oldest = lowest_key(position, left);
  const int32_t first_part = work.oldest / kChunk, last_part = min(work.newest / kChunk, parts - 1);
  if (part < first_part || part > last_part) return;
  work.begin = max(part * kChunk, work.oldest / kBlockKeys * kBlockKeys);
  work.end = min((part + 1) * kChunk, work.newest + 1);
  work.fresh = has_room && part == last_part ? position : -1;

  const Memory<T> at(bytes, kStages, layer);
  const int64_t angles = int64_t(position) * (dk / 2);
  const bool turned = cos && has_room;
  const Part found = attend<T, kStages>(
      layer, work, at, qkv + work.sequence * stride, turned ? cos + angles : nullptr,
      turned ? sin + angles : nullptr, group, tile == 0 && slice == 0, scale);

  const int64_t size = state_floats<ExactPart>(min(dv, kSlice));
  if (first_part == last_part) {
    float* own = reinterpret_cast<float*>(bytes);  // the stages are free
    const auto state_of = [&](int32_t v) { return own + v * size; };
    store(found, work, state_of);
    __syncthreads();
    merge(work, 0, 0, state_of, out_of);
    return;
  }
  const auto states_of = [&](int32_t v) {
    const int64_t row = (int64_t(work.sequence) * q_heads + head + v) * slices + slice;
    return states + row * parts * size;
  };
  store(found, work, [&](int32_t v) { return states_of(v) + part * size; });
  const int64_t tiles = gridDim.x / parts, ticket = int64_t(work.sequence) * gridDim.y + blockIdx.y;
  if (comes_last(tickets + ticket * tiles + tile, last_part - first_part + 1))
    merge(work, first_part, last_part, states_of, out_of);
}
