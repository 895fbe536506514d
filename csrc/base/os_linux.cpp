#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <cstdio>

#include "base/os.h"

namespace bitnet {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

// "max 100000" or "150000 100000": quota and period in microseconds (cgroup v2).
double quota_v2(const char* path) {
  FILE* file = std::fopen(path, "r");
  if (!file) return 0;
  double quota = 0, period = 0;
  const bool limited = std::fscanf(file, "%lf %lf", &quota, &period) == 2 && period > 0;
  std::fclose(file);
  return limited ? quota / period : 0;
}

double number_in(const char* path) {
  FILE* file = std::fopen(path, "r");
  if (!file) return 0;
  double value = 0;
  if (std::fscanf(file, "%lf", &value) != 1) value = 0;
  std::fclose(file);
  return value;
}

}  // namespace

void* os_map(size_t bytes) {
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return nullptr;
  // Advice only: a kernel without huge pages refuses it, and the mapping works all the same.
  if (bytes >= kHugePage) (void)madvise(address, bytes, MADV_HUGEPAGE);
  return address;
}

void os_unmap(void* address, size_t bytes) { munmap(address, bytes); }

int os_usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  const int count = CPU_COUNT(&set);
  return count > 0 ? count : 1;
}

double os_cpu_quota() {
  const double v2 = quota_v2("/sys/fs/cgroup/cpu.max");
  if (v2 > 0) return v2;
  const double quota = number_in("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  const double period = number_in("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  return quota > 0 && period > 0 ? quota / period : 0;
}

void os_at_fork_child(void (*in_child)()) { pthread_atfork(nullptr, nullptr, in_child); }

}  // namespace bitnet
