#include "attention/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace bitnet {
namespace {

int64_t pages_of(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

// An address that no other running thread has.
const void* this_thread() {
  thread_local const char mark = 0;
  return &mark;
}

}  // namespace

void KVCache::Sequence::add(Buffer buffer) {
  slabs.reserve(slabs.size() + 1);
  buffers.push_back(std::move(buffer));
  slabs.push_back(static_cast<uint8_t*>(buffers.back().data()));
}

int64_t KVCache::capacity(int64_t b) const {
  return std::min(int64_t(sequences_[size_t(b)].slabs.size()) * kPageTokens, shape_.max_len);
}

void KVCache::reserve(const int32_t* total) {
  // Everything that can fail comes first: the new slabs, and room for them in the tables.
  std::vector<std::vector<Buffer>> fresh(sequences_.size());
  for (size_t b = 0; b < sequences_.size(); ++b) {
    const int64_t held = int64_t(sequences_[b].slabs.size()), wanted = pages_of(total[b]);
    if (wanted <= held) continue;
    for (int64_t i = held; i < wanted; ++i) fresh[b].emplace_back(size_t(slab_bytes()));
    const size_t grown = std::max(size_t(wanted), sequences_[b].slabs.capacity());
    sequences_[b].buffers.reserve(grown);
    sequences_[b].slabs.reserve(grown);
  }
  for (size_t b = 0; b < sequences_.size(); ++b)
    for (Buffer& buffer : fresh[b]) sequences_[b].add(std::move(buffer));
}

KVCache::Sequence KVCache::twin(const Sequence& from) const {
  Sequence to;
  for (int64_t i = 0; i < pages_of(from.length); ++i) {
    Buffer buffer{size_t(slab_bytes())};
    std::memcpy(buffer.data(), from.slabs[size_t(i)], size_t(slab_bytes()));
    to.add(std::move(buffer));
  }
  to.length = from.length;
  return to;
}

void KVCache::select(const int32_t* rows, int64_t count) {
  std::vector<Sequence> chosen(static_cast<size_t>(count));
  std::vector<bool> taken(sequences_.size());
  std::vector<bool> moves(chosen.size());
  for (size_t i = 0; i < chosen.size(); ++i) {
    const size_t row = size_t(rows[i]);
    moves[i] = !taken[row];
    taken[row] = true;
    if (!moves[i]) chosen[i] = twin(sequences_[row]);
  }
  for (size_t i = 0; i < chosen.size(); ++i)
    if (moves[i]) chosen[i] = std::move(sequences_[size_t(rows[i])]);
  sequences_ = std::move(chosen);
}

std::unique_ptr<KVCache> KVCache::copy() const {
  auto made = std::make_unique<KVCache>(shape_, batch());
  for (size_t b = 0; b < sequences_.size(); ++b) made->sequences_[b] = twin(sequences_[b]);
  return made;
}

int64_t KVCache::bytes_held() const {
  int64_t pages = 0;
  for (const Sequence& sequence : sequences_) pages += pages_of(sequence.length);
  return pages * slab_bytes();
}

int64_t KVCache::bytes_reserved() const {
  int64_t pages = 0;
  for (const Sequence& sequence : sequences_) pages += int64_t(sequence.slabs.size());
  return pages * slab_bytes();
}

KVCacheUse::KVCacheUse(KVCache& cache, bool lease) {
  const void* holder = nullptr;
  if (cache.user_.compare_exchange_strong(holder, this_thread()))
    cache_ = &cache;
  else
    refused_ = lease || holder != this_thread();
}

KVCacheUse::~KVCacheUse() {
  if (cache_) cache_->user_.store(nullptr);
}

}  // namespace bitnet
