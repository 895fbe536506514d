// The only operating-system calls of the project; one os_<system>.cpp each.
#pragma once
#include <cstddef>
#include <string>

namespace bitnet {

// Zeroed whole pages; from 2 MiB on they start on a huge page, and huge ones are advised. Null:
// refused.
void* os_map(size_t bytes);
void os_unmap(void* address, size_t bytes);
void os_release(void* address, size_t bytes);  // gives the pages back, keeps the addresses
// Asks for the use of AMX's tiles, in every thread of this process; false: the kernel has none.
bool os_allow_tiles();
int os_usable_cpus();  // the affinity mask's cores
// Cores that the control groups (version 1 or 2) allow, 0: no quota; `root` stands before /proc
// and /sys in tests.
double os_cpu_quota(const std::string& root = "");
void os_at_fork_child(void (*in_child)());  // called in a forked child

}  // namespace bitnet
