#include "base/arena.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/os.h"
#include "base/types.h"

namespace bitnet {
namespace {

constexpr size_t kPage = 4096;

constexpr int64_t kUnreadable = -1;

int64_t limit_from_environment() {
  const char* text = std::getenv("BITNET_MEMORY_LIMIT");
  if (!text || !*text) return 0;
  char* end = nullptr;
  const int64_t bytes = std::strtoll(text, &end, 10);
  return *end == '\0' && bytes >= 0 ? bytes : kUnreadable;
}

std::atomic<int64_t> current{0}, peak{0};
std::atomic<int64_t> limit{limit_from_environment()};

void reserve(int64_t bytes) {
  const int64_t now = current.fetch_add(bytes) + bytes;
  const int64_t bound = limit.load();
  if (bound == 0 || (bound > 0 && now <= bound)) return;
  current.fetch_sub(bytes);
  if (bound == kUnreadable) {
    const char* text = std::getenv("BITNET_MEMORY_LIMIT");
    throw std::invalid_argument("BITNET_MEMORY_LIMIT: found '" + std::string(text ? text : "") +
                                "', wanted a number of bytes");
  }
  throw std::bad_alloc();
}

void note_peak() {
  const int64_t now = current.load();
  for (int64_t seen = peak.load(); now > seen && !peak.compare_exchange_weak(seen, now);) {
  }
}

bool mapped(size_t bytes) { return bytes >= kPage; }
// Less than this is read from a cache in any case.
constexpr size_t kSmallestPiece = size_t(128) << 10;
bool shares_a_slab(size_t bytes) { return bytes >= kSmallestPiece && bytes <= kLargestPiece; }

}  // namespace

MemoryStats memory_stats() {
  return {current.load(), peak.load(), std::max<int64_t>(0, limit.load())};
}
void reset_peak_memory() { peak.store(current.load()); }
void set_memory_limit(int64_t bytes) { limit.store(bytes); }

Buffer::Buffer(size_t bytes, bool lasting) {
  if (bytes == 0) return;
  const size_t unit = mapped(bytes) ? kPage : BITNET_LINE;
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  bytes = (bytes + unit - 1) / unit * unit;
  reserve(int64_t(bytes));
  if (lasting && shares_a_slab(bytes)) {
    const Piece piece = slab_take(bytes);
    data_ = piece.data;
    slab_ = piece.slab;
  }
  if (!data_) data_ = mapped(bytes) ? os_map(bytes) : std::aligned_alloc(BITNET_LINE, bytes);
  if (!data_) {
    current.fetch_sub(int64_t(bytes));
    throw std::bad_alloc();
  }
  note_peak();
  if (!mapped(bytes)) std::memset(data_, 0, bytes);
  bytes_ = bytes;
}

Buffer::~Buffer() {
  if (!data_) return;
  if (slab_)
    slab_return({data_, slab_}, bytes_);
  else if (mapped(bytes_))
    os_unmap(data_, bytes_);
  else
    std::free(data_);
  current.fetch_sub(int64_t(bytes_));
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      slab_(std::exchange(other.slab_, nullptr)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(slab_, other.slab_);
  return *this;
}

}  // namespace bitnet
