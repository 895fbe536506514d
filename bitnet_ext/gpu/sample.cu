// From rows of logits to tokens: those that bitnet_ext/_sampling.pyx chooses, the same for the same
// logits, whatever the order in which blocks run.
//
//   x_i = (penalised logit - the largest) / temperature
//   top_k   keeps x_i >= the k-th largest (ties of it too)
//   w_i = rint(2^43 exp(x_i)) of what is kept
//   top_p   keeps the largest w, ties lowest id first, until their sum reaches top_p of all
//   min_p   keeps w_i >= min_p * 2^43
//   the token drawn is the first in order of id at which the sum of w exceeds u * total
//
// u is Philox4x32-10 of (seed, position). Float64 operations are rounded one by one, as the CPU's;
// weights are integers, at most 2^20 of them, so no sum passes 2^63.
//
// Everything that changes from token to token is in device memory, so that a captured graph holds
// for a whole generation. Rows that are not active are left alone.
#include "select.cuh"

constexpr double kOne = 8796093022208.0;  // 2^43
constexpr int kIdBits = 20;
#define INFINITE __longlong_as_double(0x7ff0000000000000ll)

// What every kernel takes.
struct Rows {
  const float* logits;    // [rows][vocab]
  uint8_t* seen;          // [rows][vocab] marks of what the penalty applies to, or null
  const uint8_t* active;  // [rows] or null
  RowState* states;       // [rows]
  int vocab;
  double penalty;
};

struct Row {
  const float* logits;
  const uint8_t* seen;
  double penalty;
  INLINE double operator()(int i) const {
    const double logit = logits[i];
    if (!seen || !seen[i]) return logit;
    return logit < 0 ? logit * penalty : logit / penalty;
  }
};

INLINE Row row_of(const Rows& rows, int64_t m) {
  return {rows.logits + m * rows.vocab, rows.seen ? rows.seen + m * rows.vocab : nullptr,
          rows.penalty};
}

// A thread's own entries, in shared memory: a division is a call, and what lives across it spills.
// Entry i of a thread is at slot(i).
INLINE int slot(int i) { return i * kThreads + threadIdx.x; }

INLINE void load_penalised(const Row& row, int first, int count, double* numbers) {
#pragma unroll 1
  for (int i = 0; i < kEach && first + i < count; ++i) numbers[slot(i)] = row(first + i);
}

INLINE bool skipped(const Rows& rows, int64_t m) { return rows.active && !rows.active[m]; }

// exp(x) for x <= 0: x = n ln 2 + r, Taylor to r^13 / 13!, then n into the exponent; 0 below -708.
INLINE double exp_negative(double x) {
  if (!(x >= -708.0)) return 0.0;
  const double n = (x * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double y = 1.0 / 6227020800.0;
  y = y * r + 1.0 / 479001600.0;
  y = y * r + 1.0 / 39916800.0;
  y = y * r + 1.0 / 3628800.0;
  y = y * r + 1.0 / 362880.0;
  y = y * r + 1.0 / 40320.0;
  y = y * r + 1.0 / 5040.0;
  y = y * r + 1.0 / 720.0;
  y = y * r + 1.0 / 120.0;
  y = y * r + 1.0 / 24.0;
  y = y * r + 1.0 / 6.0;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  return __longlong_as_double(__double_as_longlong(y) + int64_t(n * 4503599627370496.0));
}

INLINE uint64_t weight_of(double x) {
  return uint64_t((exp_negative(x) * kOne + 4503599627370496.0) - 4503599627370496.0);
}

// A multiple of 2^-53 in [0, 1): ten rounds of Philox4x32 (Salmon et al., 2011).
INLINE double uniform(uint64_t seed, uint64_t position) {
  uint32_t c0 = uint32_t(position), c1 = uint32_t(position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int i = 0; i < 10; ++i) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = uint64_t(c0 >> 5) << 26 | c1 >> 6;
  return double(bits) * (1.0 / 9007199254740992.0);
}

// ---- 1. the largest logit, and greedy choice

struct Largest {
  uint64_t key;  // 0: none yet
  int32_t id;
};

INLINE Largest larger(Largest a, Largest b) {
  return b.key > a.key || (b.key == a.key && b.id < a.id) ? b : a;
}

INLINE Largest block_largest(Largest mine, uint64_t* keys, int32_t* ids) {
  keys[threadIdx.x] = mine.key;
  ids[threadIdx.x] = mine.id;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x >= half) continue;
    const int other = threadIdx.x + half;
    mine = larger(mine, {keys[other], ids[other]});
    keys[threadIdx.x] = mine.key;
    ids[threadIdx.x] = mine.id;
  }
  __syncthreads();
  mine = {keys[0], ids[0]};
  __syncthreads();
  return mine;
}

INLINE void choose(const Rows& rows, int64_t m, int32_t token, int32_t* tokens) {
  tokens[m] = token;
  if (rows.seen && token >= 0) rows.seen[m * rows.vocab + token] = 1;
}

// -0 orders as 0, and -inf is never chosen.
INLINE uint64_t greedy_key(double x) { return x > -INFINITE ? ordered(x + 0.0) : 0; }

__global__ void __launch_bounds__(kThreads)
    find_largest(const float* logits, uint8_t* seen, const uint8_t* active, void* states, int vocab,
                 double penalty,
                 uint64_t* keys,   // [rows][chunks]
                 int32_t* ids,     // [rows][chunks]
                 int32_t* tokens)  // [rows] for greedy choice, or null; -1: none above -inf
{
  __shared__ uint64_t shared_keys[kThreads];
  __shared__ int32_t shared_ids[kThreads];
  __shared__ double numbers[kChunk];
  const Rows rows = {logits, seen, active, static_cast<RowState*>(states), vocab, penalty};
  const int64_t m = blockIdx.y;
  if (skipped(rows, m)) return;
  const int first = blockIdx.x * kChunk + threadIdx.x * kEach;
  load_penalised(row_of(rows, m), first, vocab, numbers);
  Largest mine = {0, -1};
  for (int i = 0; i < kEach && first + i < vocab; ++i) {
    const uint64_t key = greedy_key(numbers[slot(i)]);
    if (key > mine.key) mine = {key, first + i};
  }
  mine = block_largest(mine, shared_keys, shared_ids);
  const int64_t chunks = gridDim.x;
  if (threadIdx.x == 0) {
    keys[m * chunks + blockIdx.x] = mine.key;
    ids[m * chunks + blockIdx.x] = mine.id;
  }
  if (!last_of_row(rows.states[m])) return;
  mine = {0, -1};
  for (int i = threadIdx.x; i < chunks; i += kThreads)
    mine = larger(mine, {keys[m * chunks + i], ids[m * chunks + i]});
  mine = block_largest(mine, shared_keys, shared_ids);
  if (threadIdx.x != 0) return;
  rows.states[m].highest = mine.key ? number_of(mine.key) : -INFINITE;
  rows.states[m].token = mine.id;
  rows.states[m].total = 0;
  if (tokens) choose(rows, m, mine.id, tokens);
}

// ---- 2. the k-th largest

struct ByLogit {
  const double* numbers;
  int first, wanted;
  INLINE bool key(int i, uint64_t& key, uint64_t& measure) const {
    key = ordered(numbers[slot(i - first)]);
    measure = 1;
    return true;
  }
  INLINE bool reaches(uint64_t sum) const { return sum >= uint64_t(wanted); }
};

__global__ void __launch_bounds__(kThreads)
    kth_largest_digit(const float* logits, uint8_t* seen, const uint8_t* active, void* states,
                      int vocab, double penalty, int k, int digit,
                      uint64_t* histograms)  // [rows][kBins]
{
  __shared__ double numbers[kChunk];
  const Rows rows = {logits, seen, active, static_cast<RowState*>(states), vocab, penalty};
  const int64_t m = blockIdx.y;
  if (skipped(rows, m)) return;
  const int first = blockIdx.x * kChunk + threadIdx.x * kEach;
  load_penalised(row_of(rows, m), first, vocab, numbers);
  const ByLogit entries = {numbers, first, k};
  select_digit(entries, vocab, rows.states[m], histograms + m * kBins, digit);
}

// ---- 3. weights

INLINE double scaled(double x, double highest, double temperature) {
  if (x == highest) return 0.0;  // which itself may be infinite
  return ((x == x ? x : -INFINITE) - highest) / temperature;
}

INLINE void scale(double* numbers, int count, double highest, double temperature) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) numbers[slot(i)] = scaled(numbers[slot(i)], highest, temperature);
}

__global__ void __launch_bounds__(kThreads)
    weigh(const float* logits, uint8_t* seen, const uint8_t* active, void* states, int vocab,
          double penalty, double temperature,
          int k,              // 0 keeps all
          uint64_t* weights)  // [rows][vocab]
{
  __shared__ uint64_t warps[kThreads / 32];
  __shared__ double numbers[kChunk];
  const Rows rows = {logits, seen, active, static_cast<RowState*>(states), vocab, penalty};
  const int64_t m = blockIdx.y;
  if (skipped(rows, m)) return;
  RowState& state = rows.states[m];
  const int first = blockIdx.x * kChunk + threadIdx.x * kEach;
  load_penalised(row_of(rows, m), first, vocab, numbers);
  scale(numbers, min(kEach, vocab - first), state.highest, temperature);
  double least = -INFINITE;
  if (k > 0 && state.prefix) least = scaled(number_of(state.prefix), state.highest, temperature);
  uint64_t sum = 0;
#pragma unroll 1
  for (int i = 0; i < kEach && first + i < vocab; ++i) {
    const double x = numbers[slot(i)];
    const uint64_t weight = x >= least && state.token >= 0 ? weight_of(x) : 0;
    weights[m * vocab + first + i] = weight;
    sum += weight;
  }
  sum = block_scan(sum, warps);
  if (threadIdx.x == kThreads - 1) atomicAdd(&state.total, sum);
}

// ---- 4. the nucleus

INLINE uint64_t nucleus_key(uint64_t weight, int i) {
  return weight << kIdBits | uint64_t((1 << kIdBits) - 1 - i);
}

struct ByWeight {
  const uint64_t* weights;
  double wanted;
  INLINE bool key(int i, uint64_t& key, uint64_t& measure) const {
    measure = weights[i];
    key = nucleus_key(measure, i);
    return measure > 0;
  }
  INLINE bool reaches(uint64_t sum) const { return sum > 0 && double(sum) >= wanted; }
};

__global__ void __launch_bounds__(kThreads)
    nucleus_digit(const uint64_t* weights, const uint8_t* active, void* states, int vocab,
                  double top_p, int digit,
                  uint64_t* histograms)  // [rows][kBins]
{
  const int64_t m = blockIdx.y;
  if (active && !active[m]) return;
  RowState& state = static_cast<RowState*>(states)[m];
  const ByWeight entries = {weights + m * vocab, top_p * double(state.total)};
  select_digit(entries, vocab, state, histograms + m * kBins, digit);
}

// ---- 5. the draw

// The first entry, in order, at which the sum of weights exceeds u * total. The product may have
// been rounded up to the total.
struct Drawn {
  double wanted;
  uint64_t total;
  INLINE bool operator()(uint64_t sum) const {
    return sum > 0 && (double(sum) > wanted || sum == total);
  }
};

__global__ void __launch_bounds__(kThreads)
    draw(const uint64_t* weights, uint8_t* seen, const uint8_t* active, void* states, int vocab,
         double top_p, double min_p, uint64_t seed,
         const int32_t* positions,  // [rows] of the tokens to be chosen
         uint64_t* sums,            // [rows][chunks]
         int32_t* tokens)           // [rows]
{
  __shared__ uint64_t warps[kThreads / 32];
  __shared__ uint64_t whole, before;
  __shared__ int chosen;
  const Rows rows = {nullptr, seen, active, static_cast<RowState*>(states), vocab, 1.0};
  const int64_t m = blockIdx.y, chunks = gridDim.x;
  if (skipped(rows, m)) return;
  RowState& state = rows.states[m];
  const uint64_t edge = top_p < 1.0 ? state.prefix : 0;
  const auto kept = [&](int i) -> uint64_t {
    if (i >= vocab) return 0;
    const uint64_t weight = weights[m * vocab + i];
    return nucleus_key(weight, i) >= edge && double(weight) >= min_p * kOne ? weight : 0;
  };

  uint64_t sum = 0;
  for (int i = 0; i < kEach; ++i) sum += kept(blockIdx.x * kChunk + threadIdx.x * kEach + i);
  sum = block_scan(sum, warps);
  if (threadIdx.x == kThreads - 1) sums[m * chunks + blockIdx.x] = sum;
  if (!last_of_row(state)) return;

  // The chunk: a thread has neighbouring ones.
  const int own = int(chunks + kThreads - 1) / kThreads;
  sum = 0;
  for (int i = 0; i < own; ++i)
    if (threadIdx.x * own + i < chunks) sum += sums[m * chunks + threadIdx.x * own + i];
  const uint64_t upto = block_scan(sum, warps);
  if (threadIdx.x == kThreads - 1) whole = upto;
  if (threadIdx.x == 0) chosen = -1;
  __syncthreads();
  const Drawn drawn = {uniform(seed, uint64_t(positions[m])) * double(whole), whole};
  uint64_t held = upto - sum;
  for (int i = 0; i < own && threadIdx.x * own + i < chunks; ++i) {
    const uint64_t next = held + sums[m * chunks + threadIdx.x * own + i];
    if (!drawn(held) && drawn(next)) {
      chosen = threadIdx.x * own + i;
      before = held;
    }
    held = next;
  }
  __syncthreads();
  if (chosen < 0) {  // no weights at all
    if (threadIdx.x == 0) choose(rows, m, -1, tokens);
    return;
  }

  // The entry.
  const int first = chosen * kChunk + threadIdx.x * kEach;
  sum = 0;
  for (int i = 0; i < kEach; ++i) sum += kept(first + i);
  held = before + block_scan(sum, warps) - sum;
  for (int i = 0; i < kEach; ++i) {
    const uint64_t next = held + kept(first + i);
    if (!drawn(held) && drawn(next)) choose(rows, m, first + i, tokens);
    held = next;
  }
}
