#include "dispatch/metrics.h"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "base/threads.h"

namespace bitnet {
namespace {

std::atomic<int> listeners{0};
std::mutex counts_mutex;
std::map<OpKey, OpCount>& counts() {
  static std::map<OpKey, OpCount> table;
  return table;
}
thread_local const char* mode_of_thread = "op";

}  // namespace

void metrics_listen(int change) {
  if (listeners.fetch_add(change) > 0 || change < 0) return;
  // The first listener: totals are told apart by subtraction, a maximum must start again.
  std::lock_guard lock(counts_mutex);
  for (auto& [key, count] : counts()) count.threads = 0;
}
bool metrics_on() { return listeners.load(std::memory_order_relaxed) > 0; }
void metrics_mode(const char* mode) { mode_of_thread = mode; }

std::map<OpKey, OpCount> metrics_snapshot() {
  std::lock_guard lock(counts_mutex);
  return counts();
}

void metrics_add(const char* op, const char* isa, int64_t bytes, int64_t nanoseconds) {
  std::lock_guard lock(counts_mutex);
  OpCount& count = counts()[{op, isa, mode_of_thread}];
  ++count.calls;
  count.bytes += bytes;
  count.nanoseconds += nanoseconds;
  count.threads = std::max(count.threads, last_workers());
}

}  // namespace bitnet
