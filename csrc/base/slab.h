// Regions of huge pages that lasting buffers share.  A matrix by itself ends within a huge page, or
// is smaller than one, and reading a model through 4 KiB pages costs a tenth of the bandwidth.
#pragma once
#include <cstddef>

namespace bitnet {

struct Slab;
struct Piece {
  void* data = nullptr;  // null: the system refuses
  Slab* slab = nullptr;
};

constexpr size_t kSlabBytes = size_t(64) << 20;
constexpr size_t kLargestPiece = kSlabBytes / 4;

// Zeroed bytes, whole pages, at most kLargestPiece.
Piece slab_take(size_t bytes);
// The pages go back at once, the addresses with the slab's last piece.
void slab_return(Piece piece, size_t bytes) noexcept;

}  // namespace bitnet
