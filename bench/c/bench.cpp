#include "bench.h"

// 0 when every check held and the benches ran. argv: options of Google Benchmark.
extern "C" int bench_run(const Setup* setup, int argc, char** argv) {
  benchmark::ClearRegisteredBenchmarks();
  if (!register_masks(*setup) || !register_products(*setup)) return 1;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  return benchmark::RunSpecifiedBenchmarks() > 0 ? 0 : 2;
}
