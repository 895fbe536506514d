// Ternary products beside the processor's dot-product peak and its memory's read bandwidth.
#include <stdio.h>
#include <string.h>

#include <random>
#include <string>
#include <vector>

#include "bench.h"

namespace {

struct Operands {
  std::vector<int8_t> q;
  std::vector<int32_t> out;
  int64_t rows;
  Operands(int64_t m, int64_t n, int64_t k) : q(size_t(m * k)), out(size_t(m * n)), rows(m) {
    std::minstd_rand random(1);
    for (int8_t& x : q) x = int8_t(random());
  }
};

int32_t multiply(const BitnetExtApi& api, const Weight& w, Operands& o) {
  return api.ternary_matmul(o.q.data(), o.rows, w.k, w.matrix, o.out.data(), w.n);
}

bool right(const BitnetExtApi& api, const Weight& w, int64_t rows) {
  Operands o(rows, w.n, w.k);
  if (multiply(api, w, o) != BITNET_EXT_OK) return false;
  for (int64_t m = 0; m < rows; m += 1 + rows / 7)
    for (int64_t n = 0; n < w.n; n += 1 + w.n / 101) {
      int32_t sum = 0;
      for (int64_t k = 0; k < w.k; ++k) sum += o.q[m * w.k + k] * w.codes[n * w.k + k];
      if (sum != o.out[m * w.n + n]) return false;
    }
  return true;
}

void add_gemm(const Setup& setup, const Weight& w, int64_t rows) {
  const std::string name = "gemm/" + std::string(w.name) + "/" + std::to_string(rows);
  const auto run = [=](benchmark::State& state) {
    Operands o(rows, w.n, w.k);
    for (auto _ : state) multiply(*setup.api, w, o);
    state.SetItemsProcessed(state.iterations() * rows * w.n * w.k);
  };
  timed(setup, benchmark::RegisterBenchmark(name.c_str(), run));
}

// Every matrix in turn, as decoding a token reads them.
void add_gemv(const Setup& setup, int64_t rows) {
  const auto run = [=](benchmark::State& state) {
    std::vector<Operands> operands;
    int64_t bytes = 0;
    for (int32_t i = 0; i < setup.weights; ++i) {
      operands.emplace_back(rows, setup.weight[i].n, setup.weight[i].k);
      bytes += setup.weight[i].bytes;
    }
    for (auto _ : state)
      for (int32_t i = 0; i < setup.weights; ++i)
        multiply(*setup.api, setup.weight[i], operands[size_t(i)]);
    state.SetBytesProcessed(state.iterations() * bytes);
  };
  timed(setup, benchmark::RegisterBenchmark(("gemv/all/" + std::to_string(rows)).c_str(), run));
}

using Peak = int64_t (*)(int64_t);
Peak peak_named(const char* name) {
  const struct {
    const char* name;
    Peak run;
  } peaks[] = {{"vpdpbusd_zmm", vpdpbusd_zmm},
               {"vpdpbusd_ymm", vpdpbusd_ymm},
               {"maddubs_zmm", maddubs_zmm},
               {"maddubs_ymm", maddubs_ymm}};
  for (const auto& peak : peaks)
    if (strcmp(name, peak.name) == 0) return peak.run;
  return nullptr;
}

void add_limits(const Setup& setup) {
  if (const Peak peak = peak_named(setup.peak)) {
    const auto run = [=](benchmark::State& state) {
      int64_t done = 0;
      for (auto _ : state) done += peak(1000);
      state.SetItemsProcessed(done);
    };
    timed(setup, benchmark::RegisterBenchmark("limit/dot_product", run))->Threads(setup.threads);
  }
  static const std::vector<uint8_t> memory(size_t(1) << 28, 1);
  const int64_t part = (int64_t(memory.size()) / setup.threads - 8192) / 256 * 256;
  const auto run = [=](benchmark::State& state) {
    int64_t done = 0;
    for (auto _ : state) done += read_stream(memory.data() + state.thread_index() * part, part);
    state.SetBytesProcessed(done);
  };
  timed(setup, benchmark::RegisterBenchmark("limit/memory_read", run))->Threads(setup.threads);
}

}  // namespace

bool register_products(const Setup& setup) {
  for (int32_t i = 0; i < setup.weights; ++i) {
    const Weight& w = setup.weight[i];
    if (!w.name) continue;
    for (int64_t rows : {1, 3, 128})
      if (!right(*setup.api, w, rows)) {
        fprintf(stderr, "ternary product: wrong with %s, %ld rows\n", w.name, long(rows));
        return false;
      }
    for (int64_t rows : {128, 512}) add_gemm(setup, w, rows);
  }
  for (int64_t rows : {1, 8}) add_gemv(setup, rows);
  add_limits(setup);
  return true;
}
