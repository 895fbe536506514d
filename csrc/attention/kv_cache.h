// Keys and values of a batch of sequences in pages of 64 tokens (layout in attention.h).
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention/attention.h"
#include "base/arena.h"

namespace bitnet {

struct KVShape {
  int64_t layers, kv_heads, max_len;
  int32_t dk, dv;
  Dtype dtype;
};

// Not synchronised by itself: whoever reads pages or changes the cache holds a KVCacheUse.
class KVCache {
 public:
  KVCache(const KVShape& shape, int64_t batch) : shape_(shape), sequences_(size_t(batch)) {}
  KVCache(const KVCache&) = delete;
  KVCache& operator=(const KVCache&) = delete;

  const KVShape& shape() const { return shape_; }
  int64_t batch() const { return int64_t(sequences_.size()); }
  int64_t length(int64_t b) const { return sequences_[size_t(b)].length; }
  // Tokens that the sequence's slabs hold room for.
  int64_t capacity(int64_t b) const;
  const uint8_t* const* slabs(int64_t b) const { return sequences_[size_t(b)].slabs.data(); }
  uint8_t* slab(int64_t b, int64_t token) const {
    return sequences_[size_t(b)].slabs[size_t(token / kPageTokens)];
  }
  int64_t page_offset(int64_t layer, int64_t head) const {
    return (layer * shape_.kv_heads + head) * page_bytes(shape_.dtype, shape_.dk, shape_.dv);
  }
  int64_t slab_bytes() const { return page_offset(shape_.layers, 0); }

  // Room for total[b] <= max_len tokens of each sequence; all of it or, throwing std::bad_alloc,
  // none. New slabs are zero.
  void reserve(const int32_t* total);
  void set_length(int64_t b, int64_t length) { sequences_[size_t(b)].length = length; }
  // Sequence i becomes the old rows[i]; throws std::bad_alloc and changes nothing.
  void select(const int32_t* rows, int64_t count);
  std::unique_ptr<KVCache> copy() const;

  int64_t bytes_held() const;      // of slabs with tokens in them
  int64_t bytes_reserved() const;  // of all slabs

 private:
  friend class KVCacheUse;

  struct Sequence {
    std::vector<Buffer> buffers;
    std::vector<uint8_t*> slabs;  // the buffers' addresses, as the kernels want them
    int64_t length = 0;

    void add(Buffer buffer);
  };
  Sequence twin(const Sequence& from) const;

  KVShape shape_;
  std::vector<Sequence> sequences_;
  std::atomic<const void*> user_{nullptr};
};

// A thread's claim on a cache, given back by the destructor. `lease`: a claim inside another is
// refused also to the same thread. refused() is true when somebody else has the cache.
class KVCacheUse {
 public:
  KVCacheUse(KVCache& cache, bool lease);
  ~KVCacheUse();
  KVCacheUse(const KVCacheUse&) = delete;
  KVCacheUse& operator=(const KVCacheUse&) = delete;
  bool refused() const { return refused_; }

 private:
  KVCache* cache_ = nullptr;  // to give back
  bool refused_ = false;
};

}  // namespace bitnet
