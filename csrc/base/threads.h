// The one thread pool. Work is claimed task by task from an atomic counter, so which thread runs a
// task is never fixed: a kernel's bits must not depend on it.
#pragma once
#include <cstdint>

namespace bitnet {

using TaskFn = void (*)(void* context, int64_t task);

// Runs fn(context, 0..tasks-1) on the pool and the calling thread; returns when all are done.
// When a task throws, no further task is claimed and the first exception is thrown again here.
// A nested call, or a call while another Python thread holds the pool, runs on its own thread.
void run_tasks(int64_t tasks, TaskFn fn, void* context);

template <class F>
void parallel_for(int64_t tasks, F&& fn) {
  run_tasks(
      tasks, [](void* context, int64_t task) { (*static_cast<F*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

int num_threads();
void set_num_threads(int threads);  // >= 1; 0: back to the default
int default_num_threads();          // BITNET_NUM_THREADS, OMP_NUM_THREADS, else affinity and quota

// Threads that ran at least one task of the calling thread's last run_tasks.
int last_workers();

// Scratch of the calling thread, at least `bytes` long, 64-byte aligned, uninitialised; valid until
// this thread's next call of it. Throws std::bad_alloc.
void* thread_scratch(int64_t bytes);
// The same, apart from it: what the calling thread prepares for the tasks of one run_tasks to read.
void* call_scratch(int64_t bytes);

}  // namespace bitnet
