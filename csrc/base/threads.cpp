#include "base/threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "base/arena.h"
#include "base/fpenv.h"
#include "base/os.h"

namespace bitnet {
namespace {

// A sleeping pool costs about 12 us a fork-join and a spinning one 0.25: workers spin this long
// after their last job, then sleep. Under a CPU quota or with more threads than cores they never
// spin: it would eat the time of the thread that has work.
constexpr auto kSpin = std::chrono::microseconds(50);

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

thread_local bool inside_task = false;
thread_local int workers_of_last_run = 1;

struct Job {
  TaskFn fn = nullptr;
  void* context = nullptr;
  int64_t tasks = 0;
  std::atomic<int64_t> next{0};
  std::atomic<int> worked{0};  // threads that claimed at least one task
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the task that set `failed`
};

void work_on(Job& job) {
  inside_task = true;
  bool claimed = false;
  for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;) {
    claimed = true;
    try {
      job.fn(job.context, task);
    } catch (...) {
      if (!job.failed.exchange(true)) job.error = std::current_exception();
      job.next.store(job.tasks, std::memory_order_relaxed);
    }
  }
  if (claimed) job.worked.fetch_add(1, std::memory_order_relaxed);
  inside_task = false;
}

class Pool {
 public:
  explicit Pool(int threads) : spin_(may_spin(threads)) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  int size() const { return int(workers_.size()) + 1; }

  void run(int64_t tasks, TaskFn fn, void* context) {
    job_.fn = fn;
    job_.context = context;
    job_.tasks = tasks;
    job_.next.store(0, std::memory_order_relaxed);
    job_.worked.store(0, std::memory_order_relaxed);
    door_.store(kOpen, std::memory_order_release);  // publishes the job
    epoch_.fetch_add(1);
    epoch_.notify_all();
    work_on(job_);
    close();
    workers_of_last_run = job_.worked.load(std::memory_order_relaxed);
    if (job_.failed.exchange(false)) std::rethrow_exception(std::exchange(job_.error, nullptr));
  }

 private:
  static bool may_spin(int threads) { return threads <= os_usable_cpus() && os_cpu_quota() == 0; }

  bool enter() {
    uint32_t door = door_.load(std::memory_order_relaxed);
    while (door & kOpen)
      if (door_.compare_exchange_weak(door, door + 1, std::memory_order_acquire)) return true;
    return false;
  }

  void leave() {
    if (door_.fetch_sub(1, std::memory_order_release) == 1) door_.notify_all();
  }

  // No task is left: nobody else comes in, and those inside finish theirs.
  void close() {
    const auto start = std::chrono::steady_clock::now();
    for (uint32_t inside = door_.fetch_and(~kOpen, std::memory_order_acquire) & ~kOpen; inside;
         inside = door_.load(std::memory_order_acquire)) {
      if (spin_ && std::chrono::steady_clock::now() - start < kSpin)
        cpu_pause();
      else
        door_.wait(inside, std::memory_order_acquire);
    }
  }

  void serve() {
    FpEnv environment;
    for (uint32_t seen = 0;;) {
      wait_past(seen);
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_.load()) return;
      if (!enter()) continue;
      work_on(job_);
      leave();
    }
  }

  void wait_past(uint32_t seen) {
    if (spin_) {
      const auto start = std::chrono::steady_clock::now();
      while (epoch_.load(std::memory_order_acquire) == seen) {
        for (int i = 0; i < 16; ++i) cpu_pause();
        if (std::chrono::steady_clock::now() - start > kSpin) break;
      }
    }
    epoch_.wait(seen, std::memory_order_acquire);
  }

  // Workers inside the job, and whether more may come in. A worker that wakes late finds the door
  // shut, so that a job never waits for a thread that has no core to run on.
  static constexpr uint32_t kOpen = 1u << 31;

  const bool spin_;
  Job job_;
  std::atomic<uint32_t> door_{0};
  std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

std::mutex pool_mutex;  // guards `pool` and `wanted`
std::unique_ptr<Pool>* pool = nullptr;
int wanted = 0;  // 0: the default
std::atomic<bool> busy{false};

// The threads of the parent do not exist in the child: forget them (never join), start afresh.
void after_fork_in_child() {
  new (&pool_mutex) std::mutex;
  pool = nullptr;
  busy.store(false);
}

int positive_env(const char* name) {
  const char* text = std::getenv(name);
  if (!text) return 0;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);  // OMP_NUM_THREADS may be a list: "4,2"
  return end != text && value > 0 && value <= 4096 ? int(value) : 0;
}

Pool& the_pool() {
  std::lock_guard lock(pool_mutex);
  static const bool registered = (os_at_fork_child(after_fork_in_child), true);
  (void)registered;
  const int threads = wanted ? wanted : default_num_threads();
  if (!pool) pool = new std::unique_ptr<Pool>;
  if (!*pool || (*pool)->size() != threads) {
    pool->reset();
    *pool = std::make_unique<Pool>(threads);
  }
  return **pool;
}

void run_here(int64_t tasks, TaskFn fn, void* context) {
  for (int64_t task = 0; task < tasks; ++task) fn(context, task);
  workers_of_last_run = 1;
}

// Grows and never shrinks; its bytes are counted like every other buffer's.
struct Scratch {
  Buffer buffer;
};
thread_local Scratch task_memory, call_memory;

void* grow(Scratch& scratch, int64_t bytes) {
  if (scratch.buffer.bytes() < size_t(bytes)) {
    scratch.buffer = Buffer();
    scratch.buffer = Buffer(size_t(bytes) + size_t(bytes) / 4);
  }
  return scratch.buffer.data();
}

struct Release {
  ~Release() { busy.store(false, std::memory_order_release); }
};

}  // namespace

void run_tasks(int64_t tasks, TaskFn fn, void* context) {
  FpEnv environment;
  if (tasks <= 1 || inside_task || busy.exchange(true, std::memory_order_acquire)) {
    return run_here(tasks, fn, context);
  }
  Release at_exit;
  Pool& workers = the_pool();
  if (workers.size() == 1)
    run_here(tasks, fn, context);
  else
    workers.run(tasks, fn, context);
}

int num_threads() {
  std::lock_guard lock(pool_mutex);
  return wanted ? wanted : default_num_threads();
}

void set_num_threads(int threads) {
  std::lock_guard lock(pool_mutex);
  wanted = threads;  // the next run_tasks resizes the pool
}

int default_num_threads() {
  static const int chosen = [] {
    if (const int own = positive_env("BITNET_NUM_THREADS")) return own;
    if (const int omp = positive_env("OMP_NUM_THREADS")) return omp;
    const double quota = os_cpu_quota();
    const int cpus = os_usable_cpus();
    return quota > 0 ? std::clamp(int(std::ceil(quota)), 1, cpus) : cpus;
  }();
  return chosen;
}

int last_workers() { return workers_of_last_run; }

void* thread_scratch(int64_t bytes) { return grow(task_memory, bytes); }
void* call_scratch(int64_t bytes) { return grow(call_memory, bytes); }

}  // namespace bitnet
