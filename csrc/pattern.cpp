#include "pattern.h"

#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <c10/util/hash.h>
#include <pthread.h>

#include <cstdlib>
#include <mutex>
#include <unordered_map>

#include "parallel.h"

namespace masked_ops {
namespace {

cpu::Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBool:
    case at::kByte:
      return cpu::Dtype::kByte;
    case at::kChar:
      return cpu::Dtype::kInt8;
    case at::kShort:
      return cpu::Dtype::kInt16;
    case at::kInt:
      return cpu::Dtype::kInt32;
    case at::kLong:
      return cpu::Dtype::kInt64;
    case at::kHalf:
      return cpu::Dtype::kHalf;
    case at::kBFloat16:
      return cpu::Dtype::kBFloat16;
    case at::kFloat:
      return cpu::Dtype::kFloat;
    case at::kDouble:
      return cpu::Dtype::kDouble;
    default:
      TORCH_INTERNAL_ASSERT(false, "no pattern of a mask of dtype ", dtype);
  }
}

// Where a mask lies and how it is read. The storage is compared by address: the cache's weak reference keeps that address
// from being given to another storage.
struct Key {
  const c10::StorageImpl* storage;
  const void* data;
  at::ScalarType dtype;
  c10::SmallVector<int64_t, 10> geometry;  // sizes, then strides

  explicit Key(const at::Tensor& mask)
      : storage(mask.storage().unsafeGetStorageImpl()), data(mask.const_data_ptr()), dtype(mask.scalar_type()) {
    geometry.append(mask.sizes().begin(), mask.sizes().end());
    geometry.append(mask.strides().begin(), mask.strides().end());
  }
  bool operator==(const Key&) const = default;
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    size_t hash = c10::get_hash(key.storage, key.data, static_cast<int>(key.dtype));
    for (const int64_t x : key.geometry) hash = c10::hash_combine(hash, std::hash<int64_t>()(x));
    return hash;
  }
};

struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  uint32_t version;
  PatternPtr pattern;
  uint64_t last_use;
};

// Bounded in bytes (MASKED_OPS_CACHE_BYTES, 1 GiB unless set: the bits of 8 billion weights); least recently used first.
class Cache {
 public:
  static Cache& instance() {
    static Cache* cache = new Cache;  // never destroyed: threads may outlive static destructors
    return *cache;
  }

  PatternPtr get(const at::Tensor& mask) {
    const uint32_t version = mask.unsafeGetTensorImpl()->version_counter().current_version();
    const Key key(mask);
    PatternPtr stale;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto it = entries_.find(key);
      if (it != entries_.end()) {
        it->second.last_use = ++clock_;
        if (it->second.version == version) {
          ++info_.hits;
          return it->second.pattern;
        }
        stale = it->second.pattern;
        ++info_.repacks;
      } else {
        ++info_.misses;
      }
    }
    // Outside the lock: a big mask takes milliseconds. Two threads may do it twice; the results are equal.
    PatternPtr fresh = std::make_shared<const Pattern>(mask);
    if (stale && stale->same_bits(*fresh)) fresh = stale;
    store(key, Entry{mask.storage().getWeakStorageImpl(), version, fresh, 0});
    return fresh;
  }

  void count_miss() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++info_.misses;
  }

  CacheInfo info() {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_dead();
    info_.entries = static_cast<int64_t>(entries_.size());
    return info_;
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.clear();
    info_.bytes = 0;
  }

 private:
  Cache() {
    const char* limit = std::getenv("MASKED_OPS_CACHE_BYTES");
    info_.limit_bytes = limit ? std::atoll(limit) : int64_t{1} << 30;
    // A fork while another thread holds the lock would leave it locked in the child for ever.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  void store(const Key& key, Entry entry) {
    const int64_t bytes = static_cast<int64_t>(entry.pattern->bytes());
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_dead();
    const auto it = entries_.find(key);
    if (it != entries_.end()) erase(it);
    if (bytes > info_.limit_bytes) return;
    while (info_.bytes + bytes > info_.limit_bytes) erase(least_recently_used());
    entry.last_use = ++clock_;
    entries_.emplace(key, std::move(entry));
    info_.bytes += bytes;
  }

  using Map = std::unordered_map<Key, Entry, KeyHash>;

  Map::iterator erase(Map::iterator it) {
    info_.bytes -= static_cast<int64_t>(it->second.pattern->bytes());
    return entries_.erase(it);
  }

  Map::iterator least_recently_used() {
    auto oldest = entries_.begin();
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      if (it->second.last_use < oldest->second.last_use) oldest = it;
    }
    return oldest;
  }

  void drop_dead() {
    for (auto it = entries_.begin(); it != entries_.end();) {
      it = it->second.storage.expired() ? erase(it) : std::next(it);
    }
  }

  std::mutex mutex_;
  Map entries_;
  CacheInfo info_;
  uint64_t clock_ = 0;
};

}  // namespace

Pattern::Pattern(const at::Tensor& mask) {
  const at::Tensor values = mask.contiguous();
  rows_ = mask.dim() > 1 ? mask.size(0) : 1;
  cols_ = rows_ ? mask.numel() / rows_ : 0;
  stride_ = (cols_ + 63) / 64;
  words_.resize(static_cast<size_t>(rows_ * stride_));
  const cpu::MaskFacts facts = cpu::kernels().pack_mask(team_for(values.numel()), dtype_of(values.scalar_type()),
                                                        values.const_data_ptr(), rows_, cols_, words_.data());
  nnz_ = facts.nnz;
  binary_ = facts.binary;
}

bool packable(at::ScalarType dtype) {
  return at::isIntegralType(dtype, /*includeBool=*/true) ? dtype <= at::kLong || dtype == at::kBool
                                                         : dtype == at::kHalf || dtype == at::kBFloat16 ||
                                                               dtype == at::kFloat || dtype == at::kDouble;
}

PatternPtr pattern_of(const at::Tensor& mask) {
  if (mask.is_inference()) {
    Cache::instance().count_miss();
    return std::make_shared<const Pattern>(mask);
  }
  return Cache::instance().get(mask);
}

CacheInfo cache_info() { return Cache::instance().info(); }
void clear_cache() { Cache::instance().clear(); }

}  // namespace masked_ops
