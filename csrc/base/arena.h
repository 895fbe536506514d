// Counted memory: every large buffer of the engine is a Buffer, so that current and peak bytes are
// known and BITNET_MEMORY_LIMIT holds.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/slab.h"

namespace bitnet {

struct MemoryStats {
  int64_t current, peak, limit;  // bytes; limit 0: none
};

MemoryStats memory_stats();
void reset_peak_memory();
void set_memory_limit(int64_t bytes);  // 0: none

// Zeroed bytes on a cache line (a page from 4 KiB on), huge pages advised. Throws std::bad_alloc
// when the limit or the system refuses.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : Buffer(bytes, false) {}
  // For bytes that stay, as a model's weights do: next to others in huge pages.
  static Buffer lasting(size_t bytes) { return Buffer(bytes, true); }
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  Buffer(size_t bytes, bool lasting);

  void* data_ = nullptr;
  size_t bytes_ = 0;
  Slab* slab_ = nullptr;
};

}  // namespace bitnet
