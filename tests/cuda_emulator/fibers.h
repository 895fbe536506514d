// A block's threads as fibers of one operating-system thread, and what they can wait for.
//
// A fiber runs until it waits; the scheduler goes round a warp's lanes while any of them moves on,
// then to the next warp. A round of the whole block in which nothing moves is a deadlock, and is
// reported with what each thread waits for. Kernels run with the threads and blocks in ascending
// and in descending order: a result that depends on it lacks a barrier.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

namespace emulated {

constexpr int kWarp = 32, kMaxThreads = 1024, kBarriers = 16;
constexpr size_t kStack = 128 << 10, kMaxShared = 228 << 10;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;  // zeros where from is null
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
  const char* waits_for = nullptr;
  dim3 index;
  std::vector<Copy> copies;               // cp.async since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

// Threads that execute one instruction together: a warp, or the four of a warpgroup.
template <int kLanes>
struct Team {
  const char* what[kLanes];  // the instruction where a lane stands, null when it moves on
  uint32_t mask[kLanes];
  void* operands[kLanes];
};

struct Barrier {
  int arrived = 0;
  uint32_t generation = 0;
  int sum[2] = {}, total[2] = {};  // of the predicates of this generation, and of the last one
};

struct Machine {
  std::vector<Fiber> fibers;  // grows, never shrinks: stacks are kept
  int threads = 0, current = 0;
  int alive = 0;
  uint64_t blocks = 0;  // run so far, by all launches
  bool moved = false, descending = false;
  dim3 grid, block, block_index;
  std::vector<Team<kWarp>> warps;
  std::vector<Team<4 * kWarp>> warpgroups;
  Barrier barriers[kBarriers];
  uint8_t* shared = nullptr;  // dynamic shared memory, kMaxShared bytes
  size_t shared_bytes = 0;
  jmp_buf scheduler, failed;
  std::function<void()> body;
  std::string kernel, error;
};

inline Machine machine;

inline Fiber& self() { return machine.fibers[machine.current]; }
inline int lane() { return machine.current % kWarp; }

// Ends the launch with a message; does not return.
[[noreturn]] inline void fail(const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  const dim3 b = machine.block_index;
  machine.error = machine.kernel + ": block (" + std::to_string(b.x) + ", " + std::to_string(b.y) +
                  ", " + std::to_string(b.z) + "), thread " + std::to_string(machine.current) +
                  ": " + text;
  _longjmp(machine.failed, 1);
}

__attribute__((noinline)) inline void yield() {
  if (_setjmp(self().state) == 0) _longjmp(machine.scheduler, 1);
}

// Until ready() holds.  `what` is for the report of a deadlock.
template <class Ready>
void wait_until(const char* what, Ready ready) {
  while (!ready()) {
    self().waits_for = what;
    yield();
  }
  self().waits_for = nullptr;
  machine.moved = true;
}

// One instruction of all lanes in `mask`: the last to come computes it for everyone.  Each brings
// its operands, which compute(lanes) reads and writes; absent lanes are null.
template <int kLanes, class Operands, class Compute>
void together(Team<kLanes>& team, int lane, uint32_t mask, const char* what, Operands& mine,
              Compute compute) {
  const auto takes_part = [&](int i) { return kLanes > kWarp || (mask >> i & 1); };
  if (!takes_part(lane)) fail("%s: lane %d is not in its own mask %08x", what, lane, mask);
  team.what[lane] = what;
  team.mask[lane] = mask;
  team.operands[lane] = &mine;
  Operands* operands[kLanes] = {};
  bool complete = true;
  for (int i = 0; i < kLanes && complete; ++i) {
    if (!takes_part(i)) continue;
    complete = team.what[i] && strcmp(team.what[i], what) == 0 && team.mask[i] == mask;
    operands[i] = static_cast<Operands*>(team.operands[i]);
  }
  if (complete) {
    compute(operands);
    for (int i = 0; i < kLanes; ++i)
      if (takes_part(i)) team.what[i] = nullptr;
  }
  wait_until(what, [&] { return team.what[lane] == nullptr; });
}

inline Team<kWarp>& warp() { return machine.warps[machine.current / kWarp]; }

// bar.sync of `threads` threads, 0: all that live.  Sums of what each brings, for both values.
inline Barrier& barrier_sync(int id, int threads, int value = 0) {
  if (id < 0 || id >= kBarriers) fail("barrier %d", id);
  Barrier& b = machine.barriers[id];
  const uint32_t generation = b.generation;
  ++b.arrived;
  b.sum[0] += value == 0;
  b.sum[1] += value != 0;
  wait_until("a barrier", [&] {
    if (b.generation != generation) return true;
    if (b.arrived < (threads ? threads : machine.alive)) return false;
    b.total[0] = b.sum[0], b.total[1] = b.sum[1];
    b = {0, b.generation + 1, {0, 0}, {b.total[0], b.total[1]}};
    return true;
  });
  return b;
}

inline void barrier_arrive(int id, int threads) {
  Barrier& b = machine.barriers[id];
  if (++b.arrived >= threads) b = {0, b.generation + 1, {}, {}};
  machine.moved = true;
}

inline void run_fiber() {
  for (;;) {
    machine.body();
    Fiber& fiber = self();
    if (!fiber.copies.empty() || !fiber.groups.empty()) fail("ended with asynchronous copies");
    fiber.done = machine.moved = true;
    --machine.alive;
    yield();
  }
}

__attribute__((noinline)) inline void resume(int thread) {
  machine.current = thread;
  Fiber& fiber = machine.fibers[thread];
  if (_setjmp(machine.scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

[[noreturn]] inline void report_deadlock() {
  std::string text;
  for (int t = 0; t < machine.threads; ++t) {
    const Fiber& f = machine.fibers[t];
    const char* waits = f.done ? "its end" : f.waits_for;
    if (t == 0 || text.find(waits) == std::string::npos)
      text += " thread " + std::to_string(t) + " for " + waits + ",";
  }
  text.back() = '.';
  fail("deadlock: waiting are%s", text.c_str());
}

inline void run_block() {
  machine.alive = machine.threads;
  ++machine.blocks;
  for (int t = 0; t < machine.threads; ++t) machine.fibers[t].done = false;
  for (auto& team : machine.warps) memset(&team, 0, sizeof team);
  for (auto& team : machine.warpgroups) memset(&team, 0, sizeof team);
  for (Barrier& b : machine.barriers) b = {};
  memset(machine.shared, 0xa5, machine.shared_bytes);  // whoever reads it unwritten sees it
  const int warps = (machine.threads + kWarp - 1) / kWarp;
  for (bool moved = true; machine.alive > 0;) {
    if (!moved) report_deadlock();
    moved = false;
    for (int w = 0; w < warps; ++w) {
      const int base = kWarp * (machine.descending ? warps - 1 - w : w);
      const int lanes = machine.threads - base < kWarp ? machine.threads - base : kWarp;
      do {
        machine.moved = false;
        for (int i = 0; i < lanes; ++i) {
          const int thread = base + (machine.descending ? lanes - 1 - i : i);
          if (!machine.fibers[thread].done) resume(thread);
        }
        moved |= machine.moved;
      } while (machine.moved);
    }
  }
}

inline void prepare(dim3 block, size_t shared_bytes) {
  machine.threads = int(block.x * block.y * block.z);
  machine.block = block;
  machine.shared_bytes = shared_bytes;
  if (!machine.shared) machine.shared = static_cast<uint8_t*>(aligned_alloc(1024, kMaxShared));
  const int warps = (machine.threads + kWarp - 1) / kWarp;
  machine.warps.resize(warps);
  machine.warpgroups.resize((warps + 3) / 4);
  if (machine.fibers.empty()) machine.fibers.resize(kMaxThreads);
  for (int t = 0; t < machine.threads; ++t) {
    Fiber& f = machine.fibers[t];
    f.index = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
    f.started = false;
    f.copies.clear();
    f.groups.clear();
    getcontext(&f.start);
    if (!f.start.uc_stack.ss_sp || f.start.uc_stack.ss_size != kStack) {
      f.start.uc_stack.ss_sp = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      f.start.uc_stack.ss_size = kStack;
    }
    f.start.uc_link = nullptr;
    makecontext(&f.start, run_fiber, 0);
  }
}

// Empty, or why the launch failed.
inline const char* run_grid(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                            bool descending, std::function<void()> body) {
  machine.kernel = kernel;
  machine.error.clear();
  machine.grid = grid;
  machine.descending = descending;
  machine.body = std::move(body);
  prepare(block, shared_bytes);
  if (_setjmp(machine.failed)) return machine.error.c_str();
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = descending ? blocks - 1 - i : i;
    machine.block_index = {uint32_t(b % grid.x), uint32_t(b / grid.x % grid.y),
                           uint32_t(b / grid.x / grid.y)};
    run_block();
  }
  return "";
}

}  // namespace emulated
