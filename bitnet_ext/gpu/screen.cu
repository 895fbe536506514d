// The largest logits through a screen (screen.cuh), in steps that need no decision of the host:
//
//   1. screen_query    a row of hidden states in integers, and the terms of its bound;
//                      screen_query.cuh
//   2. screen_bound    sums over the first plane, and each group's largest lower bound
//   3. screen_list<0>  the rows of the table that may be among the k largest
//   4. screen_refine   their sums over both planes, and the groups' largest lower bounds anew
//   5. screen_list<1>  those that still may be
//   6. screen_exact    their logits, with the bits of project.cu
//
// Until 6 `out` holds sums; what is not listed becomes -inf. A row of hidden states for which no
// bound is known, or of which more than `room` rows of the table are left, is marked in `whole`:
// the full product, which reads that mask, follows. Lists are in no order, their elements are.
// Rows of the table that are marked as `seen` are always listed, and count for none of the k.
#include "mma.cuh"
#include "screen_query.cuh"
#include "select.cuh"

// ---- 2. bounds from the first plane

// Bounds that are no numbers say nothing.
INLINE uint32_t lower_key(float lower) {
  return magnitude(lower) < INFINITY_F ? ordered(lower) : 0;
}

// Sums of kTiles tiles of 16 rows of the table and 4 kColumns rows of x; a warp takes them from
// end to end, with kFlight spans of each tile on their way.
// grid (ceil(rows / 4 kColumns), ceil(vocab / 16 kTiles kWarps)): neighbours share the plane in L2
template <int kColumns, int kTiles>
__global__ void __launch_bounds__(kThreads)
    screen_bound(const uint32_t* __restrict__ high,  // screen.cuh
                 const float* __restrict__ terms,    // [3][vocab]
                 const float* __restrict__ bias,     // [vocab] or null
                 const uint8_t* __restrict__ seen,   // [rows][vocab] or null
                 const int8_t* __restrict__ pieces,  // [2 rows][spans * kSpan]
                 void* rows,                         // [count] ScreenRow
                 uint32_t* largest,                  // [count][2][groups]
                 float* out,                         // [count][vocab]
                 int spans, int vocab, int count) {
  constexpr int kFlight = 4 / kTiles;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int tile = (blockIdx.y * kWarps + threadIdx.x / 32) * kTiles;
  const int first = blockIdx.x * 4 * kColumns;
  if (tile * kTileRows >= vocab) return;

  const Words4* codes = reinterpret_cast<const Words4*>(high) + int64_t(tile) * spans * 32 + lane;
  const int8_t* column[kColumns];  // past the last: the last again, not stored
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    column[c] =
        pieces + min(2 * first + 8 * c + g, 2 * count - 1) * int64_t(spans) * kSpan + 16 * t;

  const auto load = [&](Words4(&w)[kTiles], int span) {
    if (span >= spans) return;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)  // the plane ends with whole pairs of tiles
      w[i] = load_streaming(codes + (int64_t(i) * spans + span) * 32);
  };
  Words4 ring[kFlight][kTiles];
#pragma unroll
  for (int f = 0; f < kFlight; ++f) load(ring[f], f);
  int32_t sums[kTiles][kColumns][4] = {};
  for (int at = 0; at < spans; at += kFlight) {
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      const int span = at + f;
      if (span >= spans) break;
      Words4 w[kTiles];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) w[i] = ring[f][i];
      load(ring[f], span + kFlight);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const Words4 x = *reinterpret_cast<const Words4*>(column[c] + span * kSpan);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            uint32_t a[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) a[r] = w[i].x[r] >> 4 * j & 0x0f0f0f0fu;
            const uint32_t b[2] = {x.x[2 * j], x.x[2 * j + 1]};
            mma_u8_s8(sums[i][c], a, b);
          }
      }
    }
  }

  // Columns 2 t and 2 t + 1 of a fragment are the two pieces of one row of x.
  const ScreenTerms table = terms_of(terms, vocab);
  const int groups = (vocab + kGroupRows - 1) / kGroupRows;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int m = first + 4 * c + t;
    const bool screened = m < count && row_of(rows, m)->screened;
    uint32_t key = 0;
    if (screened) {
      const ScreenRow row = *row_of(rows, m);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int v = tile * kTileRows + g + 8 * i;
        if (v >= vocab) continue;
        const auto& own = sums[i / 2][c];
        const float sum =
            whole_sum(own[i % 2 * 2] - row.coarse_less, own[i % 2 * 2 + 1] - row.fine_less);
        out[int64_t(m) * vocab + v] = sum;
        if (seen && seen[int64_t(m) * vocab + v]) continue;
        key = max(key, lower_key(bounds_of<0>(table, bias, row, v, sum).lower));
      }
    }
    for (int by = 4; by < 32; by *= 2) key = max(key, __shfl_xor_sync(0xffffffffu, key, by));
    if (g == 0 && key)
      atomicMax(&largest[int64_t(m) * 2 * groups + tile * kTileRows / kGroupRows], key);
  }
}

// ---- 3., 5. lists

// The k-th largest of n keys, n >= k, for every thread of the block: digit by digit of 8 bits, but
// for the largest, whose way is shorter.
INLINE uint32_t kth_key(const uint32_t* keys, int n, uint32_t k) {
  __shared__ uint32_t bins[kThreads], digit, over;
  __shared__ uint64_t warps[kWarps];
  if (k == 1) {
    uint32_t top = 0;
    for (int i = threadIdx.x; i < n; i += kThreads) top = max(top, keys[i]);
    top = __reduce_max_sync(0xffffffffu, top);
    if (threadIdx.x % 32 == 0) bins[threadIdx.x / 32] = top;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) top = max(top, bins[i]);
    return top;
  }
  uint32_t prefix = 0, above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    bins[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads)
      if (shift == 24 || (keys[i] ^ prefix) >> (shift + 8) == 0)
        atomicAdd(&bins[keys[i] >> shift & 255], 1u);
    __syncthreads();
    const uint32_t bin = kThreads - 1 - threadIdx.x, own = bins[bin];
    const uint32_t upto = above + uint32_t(block_scan(own, warps));
    if (upto >= k && upto - own < k) {
      digit = bin;
      over = upto - own;
    }
    __syncthreads();
    prefix |= digit << shift;
    above = over;
  }
  return prefix;
}

// The rows of the table whose upper bound reaches the k-th largest lower bound of a group; all
// others become -inf. grid (ceil(vocab / kChunk), rows)
template <int kPlane>
__global__ void __launch_bounds__(kThreads)
    screen_list(const float* terms,       // [3][vocab]
                const float* bias,        // [vocab] or null
                const uint8_t* seen,      // [rows][vocab] or null
                const uint32_t* largest,  // [rows][2][groups]
                void* rows,               // [rows] ScreenRow
                uint8_t* whole,           // [rows]
                const int32_t* from,      // [rows][vocab]; the first plane's list starts from all
                int32_t* list,            // [rows][room]
                float* out,               // [rows][vocab]
                int k, int room, int vocab) {
  const int m = blockIdx.y, first = blockIdx.x * kChunk;
  ScreenRow* row = row_of(rows, m);
  const int count = kPlane == 0 ? vocab : int(row->listed[0]);
  if (!row->screened || first >= count) return;
  const ScreenTerms table = terms_of(terms, vocab);
  const int groups = (vocab + kGroupRows - 1) / kGroupRows;
  const uint32_t least = kth_key(largest + (int64_t(m) * 2 + kPlane) * groups, groups, k);
  const ScreenRow query = *row;
  if (kPlane == 1) from += int64_t(m) * vocab;
  list += int64_t(m) * room;
  out += int64_t(m) * vocab;
  if (seen) seen += int64_t(m) * vocab;

  for (int i = 0; i < kEach; ++i) {
    const int at = first + i * kThreads + threadIdx.x;
    int v = at;
    bool listed = false;
    if (at < count) {
      if (kPlane == 1) v = from[at];
      const float upper = bounds_of<kPlane>(table, bias, query, v, out[v]).upper;
      listed = upper != upper || ordered(upper) >= least || (seen && seen[v]);
      if (!listed) out[v] = -INFINITY_F;
    }
    const uint32_t chosen = __ballot_sync(0xffffffffu, listed);
    const int lane = threadIdx.x % 32;
    uint32_t place = 0;
    if (lane == 0 && chosen) place = atomicAdd(&row->listed[kPlane], uint32_t(__popc(chosen)));
    place = __shfl_sync(0xffffffffu, place, 0) + __popc(chosen & ((1u << lane) - 1));
    if (!listed) continue;
    if (place < uint32_t(room))
      list[place] = v;
    else
      whole[m] = 1;
  }
}

// ---- 4. bounds from both planes

// A warp takes kTogether rows of the list at a time, a lane 32 elements of each.
// grid (any, rows)
__global__ void __launch_bounds__(kThreads)
    screen_refine(const uint32_t* __restrict__ low,   // screen.cuh
                  const float* __restrict__ terms,    // [3][vocab]
                  const float* __restrict__ bias,     // [vocab] or null
                  const uint8_t* __restrict__ seen,   // [rows][vocab] or null
                  const int8_t* __restrict__ pieces,  // [2 rows][spans * kSpan]
                  const int32_t* __restrict__ list,   // [rows][vocab]
                  void* rows,                         // [rows] ScreenRow
                  uint32_t* largest,                  // [rows][2][groups]
                  float* out,                         // [rows][vocab]
                  int spans, int vocab) {
  constexpr int kTogether = 4;
  const int m = blockIdx.y, lane = threadIdx.x % 32;
  const ScreenRow* row = row_of(rows, m);
  if (!row->screened) return;
  const int count = int(row->listed[0]), steps = spans * (kSpan / kStep);
  const ScreenTerms table = terms_of(terms, vocab);
  const int groups = (vocab + kGroupRows - 1) / kGroupRows;
  const int8_t* coarse = pieces + int64_t(m) * 2 * spans * kSpan;
  const int8_t* fine = coarse + spans * kSpan;
  list += int64_t(m) * vocab;
  out += int64_t(m) * vocab;
  if (seen) seen += int64_t(m) * vocab;

  const int warp = blockIdx.x * kWarps + threadIdx.x / 32;
  for (int at = warp * kTogether; at < count; at += gridDim.x * kWarps * kTogether) {
    const Words4* codes[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      codes[i] =
          reinterpret_cast<const Words4*>(low) + int64_t(list[min(at + i, count - 1)]) * steps;
    int32_t sums[kTogether][2] = {};
    for (int step = lane; step < steps; step += 32) {
      Words4 words[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) words[i] = load_streaming(codes[i] + step);
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const int8_t* from = (piece == 0 ? coarse : fine) + step * kStep;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Words4 x = reinterpret_cast<const Words4*>(from)[half];
#pragma unroll
          for (int i = 0; i < kTogether; ++i)
#pragma unroll
            for (int w = 0; w < 4; ++w) {
              const uint32_t nibbles = words[i].x[2 * half + w / 2] >> w % 2 * 4 & 0x0f0f0f0fu;
              sums[i][piece] = __dp4a(int32_t(nibbles), int32_t(x.x[w]), sums[i][piece]);
            }
        }
      }
    }
    int32_t own[2] = {};  // lane i finishes row i
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const int32_t sum = __reduce_add_sync(0xffffffffu, sums[i][piece]);
        if (lane == i) own[piece] = sum;
      }
    if (lane >= kTogether || at + lane >= count) continue;
    const int v = list[at + lane];
    const float sum = fma_rn(out[v], 16.0f, whole_sum(own[0], own[1]));
    out[v] = sum;
    if (seen && seen[v]) continue;
    const uint32_t key = lower_key(bounds_of<1>(table, bias, *row, v, sum).lower);
    atomicMax(&largest[(int64_t(m) * 2 + 1) * groups + v / kGroupRows], key);
  }
}

// ---- 6. the logits themselves

constexpr int kHeldBytes = 2048;  // of a row of the table, in shared memory

// Half a warp takes a row of the list, a lane one of its sixteen chains (project.cu).
// grid (any, rows); shared: kHeldBytes for each half warp
template <class T>
__global__ void __launch_bounds__(kThreads)
    screen_exact(const T* __restrict__ table,     // [vocab][stride]
                 int64_t stride, const float* x,  // [rows][width]
                 const float* bias,               // [vocab] or null
                 const int32_t* list,             // [rows][room]
                 void* rows,                      // [rows] ScreenRow
                 const uint8_t* whole,            // [rows]
                 float* out,                      // [rows][vocab]
                 int width, int room, int vocab) {
  constexpr int kHeld = kHeldBytes / sizeof(T), kPiece = 16 / sizeof(T);  // elements
  DYNAMIC_SHARED(memory);
  const int m = blockIdx.y, warp = threadIdx.x / 32, chain = threadIdx.x % 16;
  const int half = threadIdx.x / 16 % 2;
  const ScreenRow* row = row_of(rows, m);
  if (!row->screened || whole[m]) return;
  const int count = int(row->listed[1]), padded = (width + 15) / 16 * 16;
  T* held = reinterpret_cast<T*>(memory + (2 * warp + half) * kHeldBytes);
  x += int64_t(m) * width;
  list += int64_t(m) * room;

  for (int at = (blockIdx.x * kWarps + warp) * 2; at < count; at += gridDim.x * kWarps * 2) {
    const int v = list[min(at + half, count - 1)];
    const T* from = table + v * stride;
    float sum = 0.0f;
    for (int begin = 0; begin < padded; begin += kHeld) {
      const int n = min(kHeld, padded - begin);
      for (int i = chain * kPiece; i < n; i += 16 * kPiece) copy_async(held + i, from + begin + i);
      copy_async_commit();
      copy_async_wait<0>();
      __syncwarp();
#pragma unroll 8
      for (int i = chain; i < n; i += 16) {
        const int e = begin + i;
        sum = fma_rn(to_float(held[i]), e < width ? x[e] : 0.0f, sum);
      }
      __syncwarp();
    }
    for (int by = 8; by > 0; by /= 2) sum = add_rn(sum, __shfl_xor_sync(0xffffffffu, sum, by));
    if (chain != 0 || at + half >= count) continue;
    if (bias) sum = add_rn(sum, bias[v]);
    out[int64_t(m) * vocab + v] = one_nan(sum);
  }
}
