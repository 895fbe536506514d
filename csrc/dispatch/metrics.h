// Per-op call counts for DispatchMetrics: off (one relaxed load a call) unless somebody listens.
#pragma once
#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>

namespace bitnet {

struct OpCount {
  int64_t calls = 0, bytes = 0, nanoseconds = 0;
  int threads = 0;  // the most that ran in one call since somebody began to listen
};
using OpKey = std::tuple<std::string, std::string, std::string>;  // op, isa, mode

void metrics_listen(int change);  // +1 / -1 listener
std::map<OpKey, OpCount> metrics_snapshot();
void metrics_mode(const char* mode);  // of the calling thread: "full", "incremental" or "op"
bool metrics_on();
void metrics_add(const char* op, const char* isa, int64_t bytes, int64_t nanoseconds);

// Counts one call of `op` that reads and writes `bytes`, timed by its own life.
class MetricsScope {
 public:
  MetricsScope(const char* op, const char* isa, int64_t bytes)
      : op_(op), isa_(isa), bytes_(bytes), on_(metrics_on()) {
    if (on_) start_ = std::chrono::steady_clock::now();
  }
  void add_bytes(int64_t bytes) { bytes_ += bytes; }
  ~MetricsScope() {
    if (on_)
      metrics_add(op_, isa_, bytes_,
                  std::chrono::nanoseconds(std::chrono::steady_clock::now() - start_).count());
  }

 private:
  const char *op_, *isa_;
  int64_t bytes_;
  bool on_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace bitnet
