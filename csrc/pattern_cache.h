// What is derived of a mask is kept for as long as the mask lives and its version counter stands still.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>

namespace masked_ops {

// What the cache holds of a mask: a Pattern of one in CPU memory, a DevicePattern of one on a device.
class Cached {
 public:
  virtual ~Cached() = default;
  virtual size_t bytes() const = 0;
  // Whether what is known of another is as good; false if that cannot be told.
  virtual bool same_bits(const Cached& other) const = 0;
  // What keeps other threads from adding to it, where a forked child can use it.
  virtual std::unique_lock<std::mutex> locked() const { return {}; }

  // Whether the cache has given it out before: a mask that is made for one call is not worth an index.
  bool reused() const { return reused_.load(std::memory_order_relaxed); }
  void mark_reused() const { reused_.store(true, std::memory_order_relaxed); }

  // A graph that was captured reads it at every replay: it lives as long as its mask.
  bool captured() const { return captured_.load(std::memory_order_relaxed); }
  void mark_captured() const { captured_.store(true, std::memory_order_relaxed); }

 private:
  mutable std::atomic<bool> reused_{false};
  mutable std::atomic<bool> captured_{false};
};

using CachedPtr = std::shared_ptr<const Cached>;

// What the cache holds of a mask, or of packed bits of cols columns (-1: a mask); else what make(stale) gives, of which
// stale is what the cache held of a former version, or null.
using Make = std::function<CachedPtr(const Cached* stale)>;
CachedPtr cached_of(const at::Tensor& mask, int64_t cols, const Make& make);
// Makes room after one has grown.
void trim_cache();
// Whether so much more may be held without anything being forgotten.
bool cache_has_room(int64_t bytes);

struct CacheInfo {
  int64_t entries = 0;
  int64_t bytes = 0;
  int64_t limit_bytes = 0;
  int64_t hits = 0;
  int64_t misses = 0;   // masks not seen before, and those that cannot be cached
  int64_t repacks = 0;  // masks seen before in another version
};

CacheInfo cache_info();
void clear_cache();

}  // namespace masked_ops
