#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>

#include "base/os.h"

namespace bitnet {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

// The first one or two numbers of a file; how many there were. "max" is no number.
int numbers_in(const std::string& path, double* first, double* second) {
  FILE* file = std::fopen(path.c_str(), "r");
  if (!file) return 0;
  const int found = std::fscanf(file, "%lf %lf", first, second);
  std::fclose(file);
  return found;
}

// Microseconds of CPU time allowed in a period, as cores; 0: no quota.
double quota_of_group(const std::string& directory) {
  double quota = 0, period = 0, unused = 0;
  if (numbers_in(directory + "/cpu.max", &quota, &period) != 2)  // version 2, else version 1
    if (numbers_in(directory + "/cpu.cfs_quota_us", &quota, &unused) != 1 ||
        numbers_in(directory + "/cpu.cfs_period_us", &period, &unused) != 1)
      return 0;
  return quota > 0 && period > 0 ? quota / period : 0;
}

// The least quota of a group and those above it. A container may see its own group as "/", or the
// host's name for it, of which only the top exists inside.
double quota_up_from(const std::string& mount, std::string group) {
  double least = 0;
  for (;;) {
    const double quota = quota_of_group(mount + group);
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
    if (group.empty()) return least;
    group.erase(group.rfind('/'));
  }
}

bool lists(const std::string& controllers, const std::string& name) {
  return ("," + controllers + ",").find("," + name + ",") != std::string::npos;
}

}  // namespace

void* os_map(size_t bytes) {
  const bool huge = bytes >= kHugePage;
  const size_t room = huge ? bytes + kHugePage : bytes;
  void* mapped = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (!huge) return mapped;
  const uintptr_t from = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t start = (from + kHugePage - 1) / kHugePage * kHugePage;
  if (start > from) munmap(mapped, start - from);
  munmap(reinterpret_cast<void*>(start + bytes), from + room - start - bytes);
  void* address = reinterpret_cast<void*>(start);
  // Advice only: a kernel without huge pages refuses it, and the mapping works all the same.
  (void)madvise(address, bytes, MADV_HUGEPAGE);
  return address;
}

void os_release(void* address, size_t bytes) { (void)madvise(address, bytes, MADV_DONTNEED); }

void os_unmap(void* address, size_t bytes) { munmap(address, bytes); }

bool os_allow_tiles() {
#if defined(__x86_64__)
  // Their 8 KB are saved only for processes that ask: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  // (Documentation/arch/x86/xstate.rst).
  constexpr int request = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

int os_usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  // Refused where the system has more cores than the set has bits.
  const bool known = sched_getaffinity(0, sizeof set, &set) == 0;
  return std::max(1, known ? CPU_COUNT(&set) : int(sysconf(_SC_NPROCESSORS_ONLN)));
}

double os_cpu_quota(const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  double least = 0;
  for (std::string line; std::getline(groups, line);) {  // number:controllers:/group
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos || second + 1 >= line.size() || line[second + 1] != '/')
      continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string group = line.substr(second + 1);
    if (group == "/") group.clear();
    if (!controllers.empty() && !lists(controllers, "cpu")) continue;
    for (const char* mount : {"", "/cpu", "/cpu,cpuacct", "/unified"}) {
      const double quota = quota_up_from(root + "/sys/fs/cgroup" + mount, group);
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
    }
  }
  return least;
}

void os_at_fork_child(void (*in_child)()) { pthread_atfork(nullptr, nullptr, in_child); }

}  // namespace bitnet
