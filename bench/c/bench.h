// What the C-level bench is given by bench/c/run.py, and its parts.
#pragma once
#include <benchmark/benchmark.h>
#include <stdint.h>

#include "bitnet_ext/capi.h"

struct Weight {
  const char* name;  // of a matrix to be measured by itself; null: one of the GEMV's others
  const BitnetExtTernary* matrix;
  const int8_t* codes;  // [n, k] of -1, 0, 1, to check with; null like the name
  int64_t n, k, bytes;
};

struct Setup {
  const BitnetExtApi* api;
  const char* peak;  // the dot product in registers that is this ISA's limit
  int32_t threads;   // that the kernels use
  int32_t weights;
  const Weight* weight;
};

// One thread is timed by its own clock, which stands still while others have the core; several, by
// the wall's.
inline benchmark::internal::Benchmark* timed(const Setup& setup,
                                             benchmark::internal::Benchmark* bench) {
  return setup.threads == 1 ? bench : bench->UseRealTime();
}

// Each checks its results (false, with a line on stderr, when one is wrong), then registers its
// kernels and limits.
bool register_masks(const Setup& setup);
bool register_products(const Setup& setup);

// bench/limits.cpp
extern "C" {
int64_t vpdpbusd_zmm(int64_t rounds);
int64_t vpdpbusd_ymm(int64_t rounds);
int64_t maddubs_ymm(int64_t rounds);
int64_t maddubs_zmm(int64_t rounds);
int64_t read_stream(const uint8_t* p, int64_t bytes);
}
