// The only operating-system calls of the project; one os_<system>.cpp each.
#pragma once
#include <cstddef>

namespace bitnet {

void* os_map(
    size_t bytes);  // zeroed, page-aligned, huge pages advised from 2 MiB on; null: refused
void os_unmap(void* address, size_t bytes);
int os_usable_cpus();                       // the affinity mask's cores
double os_cpu_quota();                      // cores that the cgroup allows, 0: no quota
void os_at_fork_child(void (*in_child)());  // called in a forked child

}  // namespace bitnet
