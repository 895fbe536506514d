#include "base/slab.h"

#include <cstdint>
#include <mutex>
#include <new>

#include "base/os.h"

namespace bitnet {

struct Slab {
  uint8_t* start;
  size_t used = 0;
  int pieces = 0;
};

namespace {

std::mutex mutex;         // guards every slab
Slab* filling = nullptr;  // the one that pieces are taken from

bool open_slab() {
  void* start = os_map(kSlabBytes);
  if (!start) return false;
  filling = new (std::nothrow) Slab{static_cast<uint8_t*>(start)};
  if (!filling) os_unmap(start, kSlabBytes);
  return filling;
}

}  // namespace

Piece slab_take(size_t bytes) {
  std::lock_guard lock(mutex);
  const bool full = filling && filling->used + bytes > kSlabBytes;
  if ((!filling || full) && !open_slab()) return {};
  void* data = filling->start + filling->used;
  filling->used += bytes;
  ++filling->pieces;
  return {data, filling};
}

void slab_return(Piece piece, size_t bytes) noexcept {
  std::lock_guard lock(mutex);
  Slab* slab = piece.slab;
  if (--slab->pieces > 0) return os_release(piece.data, bytes);
  os_unmap(slab->start, kSlabBytes);
  if (slab == filling) filling = nullptr;
  delete slab;
}

}  // namespace bitnet
