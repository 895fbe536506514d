#include "run/cached.h"

#include <algorithm>
#include <vector>

#include "base/threads.h"
#include "dispatch/dispatch.h"
#include "dispatch/metrics.h"

namespace bitnet {
namespace {

// Fewer multiplications than this are done before a second thread has woken.
constexpr int64_t kSerialWork = 1 << 15;
constexpr int64_t kAppendRows = 16;         // rows of a task: one K tile when a prompt starts at 0
constexpr int32_t kStackFloats = 48 << 10;  // states of one task
constexpr int64_t kSplitFloats = 1 << 20;   // states of all chunks when tasks are split by chunk

// Some query vectors of one sequence and kv head, and the chunks of keys that they see.
struct Block {
  AttendTask task;
  float* out;
  int64_t first_chunk, chunks;
};

struct Plan {
  std::vector<Block> blocks;
  int64_t out_stride = 0;
  int32_t dv = 0;
  int64_t most_chunks = 0, most_vectors = 0;
  int64_t products = 0, bytes = 0;
};

int32_t vectors_per_block(int64_t all, int32_t dv) {
  // Few enough for every thread to have several blocks, and for two states each on the stack.
  const int64_t fitting = kStackFloats / (2 * state_floats(dv)) / kTileVectors * kTileVectors;
  const int64_t shared = (all / (4 * num_threads()) / kTileVectors + 1) * kTileVectors;
  return int32_t(std::min(fitting, shared));
}

void add_blocks(Plan& plan, AttendTask task, float* out, int32_t vectors, int32_t limit) {
  for (task.first = 0; task.first < vectors; task.first += limit) {
    task.count = std::min(limit, vectors - task.first);
    const int64_t oldest = int64_t(task.first_pos) + task.first / task.group;
    const int64_t newest = int64_t(task.first_pos) + (task.first + task.count - 1) / task.group;
    const int64_t low = task.window_left < 0 ? 0 : std::max<int64_t>(0, oldest - task.window_left);
    const int64_t first_chunk = low / kChunkTokens;
    const int64_t chunks = newest / kChunkTokens - first_chunk + 1;
    plan.blocks.push_back({task, out, first_chunk, chunks});
    plan.most_chunks = std::max(plan.most_chunks, chunks);
    plan.most_vectors = std::max<int64_t>(plan.most_vectors, task.count);
    plan.products += task.count * (newest + 1 - low) * (task.dk + task.dv);
  }
}

Plan plan_blocks(const AttendCall& a) {
  const KVCache& cache = *a.cache;
  const KVShape& shape = cache.shape();
  const int32_t group = a.heads.q / a.heads.kv;
  Plan plan;
  plan.out_stride = a.out.stride;
  plan.dv = shape.dv;
  const int32_t limit = vectors_per_block(a.qkv.rows * a.heads.q, shape.dv);
  for (int64_t b = 0; b < cache.batch(); ++b) {
    const int32_t rows = a.starts[b + 1] - a.starts[b];
    if (rows == 0) continue;
    for (int32_t h = 0; h < a.heads.kv; ++h) {
      const AttendTask task = {cache.slabs(b),
                               cache.page_offset(a.layer, h),
                               shape.dtype,
                               shape.dk,
                               shape.dv,
                               a.qkv.row(a.starts[b]) + int64_t(h) * group * shape.dk,
                               a.qkv.stride,
                               group,
                               a.first_pos[b],
                               0,
                               0,
                               a.window_left,
                               a.scale};
      float* out = a.out.row(a.starts[b]) + int64_t(h) * group * shape.dv;
      add_blocks(plan, task, out, rows * group, limit);
    }
    const int64_t first = a.first_pos[b], last = first + rows;
    const int64_t low = a.window_left < 0 ? 0 : std::max<int64_t>(0, first - a.window_left);
    plan.bytes +=
        (last - low) * a.heads.kv * page_bytes(shape.dtype, shape.dk, shape.dv) / kPageTokens;
  }
  plan.bytes += 4 * a.qkv.rows * (int64_t(a.heads.q) * shape.dk + a.out.cols);
  return plan;
}

// All chunks of a block in one task, states on the stack.
void run_block(const AttentionKernels& kernel, const Plan& plan, const Block& block) {
  alignas(BITNET_LINE) float states[kStackFloats];
  const int64_t size = state_floats(plan.dv) * block.task.count;
  kernel.chunk(block.task, block.first_chunk, states);
  for (int64_t c = 1; c < block.chunks; ++c) {
    kernel.chunk(block.task, block.first_chunk + c, states + size);
    kernel.merge(states, states + size, block.task.count, plan.dv);
  }
  kernel.finish(block.task, states, block.out, plan.out_stride);
}

// A task for each chunk, for decoding against a long context: states in `scratch`.
void run_split(const AttentionKernels& kernel, const Plan& plan, float* scratch) {
  const int64_t size = state_floats(plan.dv) * plan.most_vectors;
  const int64_t tasks = int64_t(plan.blocks.size()) * plan.most_chunks;
  parallel_for(tasks, [&](int64_t task) {
    const Block& block = plan.blocks[size_t(task / plan.most_chunks)];
    const int64_t c = task % plan.most_chunks;
    if (c < block.chunks) kernel.chunk(block.task, block.first_chunk + c, scratch + task * size);
  });
  for (const Block& block : plan.blocks) {
    for (int64_t c = 1; c < block.chunks; ++c)
      kernel.merge(scratch, scratch + c * size, block.task.count, plan.dv);
    kernel.finish(block.task, scratch, block.out, plan.out_stride);
    scratch += plan.most_chunks * size;
  }
}

float* split_scratch(const Plan& plan) {
  const int64_t blocks = int64_t(plan.blocks.size());
  if (plan.most_chunks < 2 || blocks >= 4 * num_threads()) return nullptr;
  const int64_t floats = blocks * plan.most_chunks * plan.most_vectors * state_floats(plan.dv);
  if (floats > kSplitFloats) return nullptr;
  try {
    return static_cast<float*>(thread_scratch(4 * floats));
  } catch (const std::bad_alloc&) {
    return nullptr;  // under a memory limit: whole blocks do without
  }
}

void run_plan(const AttentionKernels& kernel, const Plan& plan) {
  const int64_t blocks = int64_t(plan.blocks.size());
  if (plan.products < kSerialWork) {
    parallel_for(1, [&](int64_t) {
      for (const Block& block : plan.blocks) run_block(kernel, plan, block);
    });
  } else if (float* scratch = split_scratch(plan)) {
    run_split(kernel, plan, scratch);
  } else {
    parallel_for(blocks, [&](int64_t i) { run_block(kernel, plan, plan.blocks[size_t(i)]); });
  }
}

}  // namespace

void run_append(const AppendCall& a) {
  const KVShape& shape = a.cache->shape();
  const AttentionKernels& kernel = *kernels().attention;
  const MetricsScope metrics("rope_append", kernel.isa, 8 * a.qkv.rows * a.qkv.cols);
  const int64_t work = a.qkv.rows * a.qkv.cols * 8;  // an element moved counts as several products
  const int64_t step = work < kSerialWork ? a.qkv.rows : kAppendRows;
  parallel_for(step ? (a.qkv.rows + step - 1) / step : 0, [&](int64_t task) {
    for (int64_t i = task * step; i < std::min(a.qkv.rows, (task + 1) * step); ++i) {
      const int32_t pos = a.pos[i];
      kernel.append({a.qkv.row(i), a.rope.cos.data ? a.rope.cos.row(pos) : nullptr,
                     a.rope.sin.data ? a.rope.sin.row(pos) : nullptr,
                     a.cache->slab(a.seq[i], pos) + a.cache->page_offset(a.layer, 0), shape.dtype,
                     int32_t(pos % kPageTokens), a.heads.q, a.heads.kv, shape.dk, shape.dv});
    }
  });
}

void run_attend(const AttendCall& a) {
  const AttentionKernels& kernel = *kernels().attention;
  const Plan plan = plan_blocks(a);
  const MetricsScope metrics(a.prefill ? "attention_prefill" : "attention_decode", kernel.isa,
                             plan.bytes);
  run_plan(kernel, plan);
}

}  // namespace bitnet
