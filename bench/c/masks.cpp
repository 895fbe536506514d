// Causal mask fill beside the element loop it replaces, and beside filling the same memory.
#include <stdio.h>
#include <string.h>

#include <limits>
#include <string>
#include <vector>

#include "bench.h"

namespace {

constexpr float kHide = -std::numeric_limits<float>::infinity();

// The loop that the fill replaces, as the code it comes from has it: a new vector of zeros, and
// -inf stored element by element through a checked index.
__attribute__((noinline)) void fresh_loop(float*, int64_t q_len, int64_t k_len, int64_t past) {
  std::vector<float> mask(size_t(q_len * k_len), 0.0f);
  for (int64_t i = 0; i < q_len; ++i)
    for (int64_t j = past + i + 1; j < k_len; ++j) mask.at(size_t(i * k_len + j)) = kHide;
  benchmark::DoNotOptimize(mask.data());
  benchmark::ClobberMemory();
}

// The same in memory of the caller's, unchecked.
__attribute__((noinline)) void element_loop(float* mask, int64_t q_len, int64_t k_len,
                                            int64_t past) {
  memset(mask, 0, size_t(q_len * k_len) * sizeof(float));
  for (int64_t i = 0; i < q_len; ++i)
    for (int64_t j = past + i + 1; j < k_len; ++j) mask[i * k_len + j] = kHide;
}

// The same with the compiler's own vector instructions.
__attribute__((noinline, optimize("O3"))) void vector_loop(float* mask, int64_t q_len,
                                                           int64_t k_len, int64_t past) {
  memset(mask, 0, size_t(q_len * k_len) * sizeof(float));
  for (int64_t i = 0; i < q_len; ++i)
    for (int64_t j = past + i + 1; j < k_len; ++j) mask[i * k_len + j] = kHide;
}

void memory_fill(float* mask, int64_t q_len, int64_t k_len, int64_t) {
  memset(mask, 0, size_t(q_len * k_len) * sizeof(float));
}

bool right(const BitnetExtApi& api, int64_t q_len, int64_t k_len, int64_t past) {
  std::vector<float> wanted(size_t(q_len * k_len)), found(wanted.size(), 1.0f);
  element_loop(wanted.data(), q_len, k_len, past);
  const int32_t status =
      api.causal_mask_fill(found.data(), k_len * 4, BITNET_EXT_MASK_F32, q_len, k_len, past, -1, 0);
  return status == BITNET_EXT_OK &&
         memcmp(wanted.data(), found.data(), wanted.size() * sizeof(float)) == 0;
}

template <class Fill>
void add(const Setup& setup, const char* what, int64_t n, Fill fill) {
  const std::string name = "mask/" + std::string(what) + "/" + std::to_string(n);
  timed(setup, benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
          std::vector<float> mask(size_t(n * n));
          for (auto _ : state) {
            fill(mask.data(), n, n, int64_t(0));
            benchmark::ClobberMemory();
          }
          state.SetBytesProcessed(state.iterations() * n * n * int64_t(sizeof(float)));
        }));
}

}  // namespace

bool register_masks(const Setup& setup) {
  const BitnetExtApi* api = setup.api;
  for (int64_t n : {64, 128, 256, 512, 1024, 2048}) {
    for (int64_t past : {int64_t(0), n / 3})
      if (!right(*api, n - past, n, past)) {
        fprintf(stderr, "mask fill: wrong at %ld x %ld\n", long(n - past), long(n));
        return false;
      }
    add(setup, "kernel", n, [api](float* mask, int64_t q_len, int64_t k_len, int64_t past) {
      api->causal_mask_fill(mask, k_len * 4, BITNET_EXT_MASK_F32, q_len, k_len, past, -1, 0);
    });
    add(setup, "fresh_loop", n, fresh_loop);
    add(setup, "element_loop", n, element_loop);
    add(setup, "vector_loop", n, vector_loop);
    add(setup, "memory_fill", n, memory_fill);
  }
  return true;
}
