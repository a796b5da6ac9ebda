#include "pattern_cache.h"

#include <c10/util/SmallVector.h>
#include <c10/util/hash.h>
#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace masked_ops {
namespace {

// Where a mask lies and how it is read. The storage is compared by address: the cache's weak reference keeps that
// address from being given to another storage.
struct Key {
  const c10::StorageImpl* storage;
  const void* data;
  at::ScalarType dtype;
  int64_t cols;                            // of packed bits; -1 for a mask
  c10::SmallVector<int64_t, 10> geometry;  // sizes, then strides

  Key(const at::Tensor& mask, int64_t cols)
      : storage(mask.storage().unsafeGetStorageImpl()),
        data(mask.const_data_ptr()),
        dtype(mask.scalar_type()),
        cols(cols) {
    geometry.append(mask.sizes().begin(), mask.sizes().end());
    geometry.append(mask.strides().begin(), mask.strides().end());
  }
  bool operator==(const Key&) const = default;
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    size_t hash = c10::get_hash(key.storage, key.data, static_cast<int>(key.dtype), key.cols);
    for (const int64_t x : key.geometry) hash = c10::hash_combine(hash, std::hash<int64_t>()(x));
    return hash;
  }
};

// A mask's version, and the counter that it is of: of one memory there may be several, in views that autograd made
// none of (`mask.data`, or a view within inductor's code), and none of them counts another one's edits.
struct Version {
  c10::VariableVersion counter;  // kept, so that no other one gets its address
  uint32_t value;

  explicit Version(const at::Tensor& mask)
      : counter(mask.unsafeGetTensorImpl()->version_counter()), value(counter.current_version()) {}
  // VariableVersion is a pointer and nothing else, but lets nobody see it. A copy of it would count references.
  bool is_of(const at::Tensor& mask) const {
    static_assert(sizeof(counter) == sizeof(void*));
    const c10::VariableVersion& now = mask.unsafeGetTensorImpl()->version_counter();
    return value == now.current_version() && std::memcmp(&counter, &now, sizeof(counter)) == 0;
  }
};

struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  Version version;
  CachedPtr pattern;
  uint64_t last_use;
};

// Bounded in bytes (MASKED_OPS_CACHE_BYTES, 1 GiB unless set: the bits of 8 billion weights); least recently used
// first.
class Cache {
 public:
  static Cache& instance() {
    static Cache* cache = new Cache;  // never destroyed: threads may outlive static destructors
    return *cache;
  }

  CachedPtr get(const at::Tensor& mask, int64_t cols, const Make& make) {
    if (mask.is_inference()) {
      count_miss();
      return make(nullptr);
    }
    const Key key(mask, cols);
    CachedPtr stale;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto it = entries_.find(key);
      if (it != entries_.end()) {
        it->second.last_use = ++clock_;
        if (it->second.version.is_of(mask)) {
          ++info_.hits;
          it->second.pattern->mark_reused();
          return it->second.pattern;
        }
        stale = it->second.pattern;
        ++info_.repacks;
      } else {
        ++info_.misses;
      }
    }
    const Version version(mask);  // as it is read
    // Outside the lock: a big mask takes milliseconds. Two threads may do it twice; the results are equal.
    CachedPtr fresh = make(stale.get());
    if (stale) {
      if (stale->same_bits(*fresh)) fresh = stale;
      fresh->mark_reused();
    }
    store(key, Entry{mask.storage().getWeakStorageImpl(), version, fresh, 0});
    return fresh;
  }

  CacheInfo info() {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_dead();
    info_.entries = static_cast<int64_t>(entries_.size());
    info_.bytes = bytes();
    return info_;
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!entries_.empty()) drop(entries_.begin());
  }

  bool has_room(int64_t more) {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_dead();
    return bytes() + more <= info_.limit_bytes;
  }

  // After a pattern has grown: others make room for it.
  void trim() {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_dead();
    make_room(0);
  }

 private:
  void count_miss() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++info_.misses;
  }

  Cache() {
    const char* limit = std::getenv("MASKED_OPS_CACHE_BYTES");
    info_.limit_bytes = limit && *limit ? std::atoll(limit) : int64_t{1} << 30;
    // A fork while another thread holds a lock, of the cache's or of a pattern's, would leave it locked in the child
    // for ever.
    pthread_atfork([] { instance().before_fork(); }, [] { instance().after_fork(); }, [] { instance().after_fork(); });
  }

  void before_fork() {
    mutex_.lock();
    for (const auto& [key, entry] : entries_) locked_.push_back(entry.pattern->locked());
  }
  void after_fork() {
    locked_.clear();
    mutex_.unlock();
  }

  using Map = std::unordered_map<Key, Entry, KeyHash>;

  void store(const Key& key, Entry entry) {
    const int64_t bytes = static_cast<int64_t>(entry.pattern->bytes());
    const std::lock_guard<std::mutex> lock(mutex_);
    entry.last_use = ++clock_;
    if (const auto it = entries_.find(key); it != entries_.end()) {
      // The same bits once more, as DDP writes them in each step: no way through all entries.
      if (it->second.pattern == entry.pattern) {
        it->second = std::move(entry);
        return;
      }
      drop(it);
    }
    drop_dead();
    if (bytes > info_.limit_bytes) return;
    make_room(bytes);
    entries_.emplace(key, std::move(entry));
  }

  int64_t bytes() const {
    int64_t sum = 0;
    for (const auto& [key, entry] : entries_) sum += static_cast<int64_t>(entry.pattern->bytes());
    return sum;
  }

  void make_room(int64_t wanted) {
    int64_t held = bytes();
    while (!entries_.empty() && held + wanted > info_.limit_bytes) {
      const auto it = least_recently_used();
      held -= static_cast<int64_t>(it->second.pattern->bytes());
      drop(it);
    }
  }

  Map::iterator least_recently_used() {
    auto oldest = entries_.begin();
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      if (it->second.last_use < oldest->second.last_use) oldest = it;
    }
    return oldest;
  }

  // Out of the cache, but not out of memory if a captured graph reads it.
  void drop(Map::iterator it) {
    if (it->second.pattern->captured()) captured_.push_back(std::move(it->second));
    entries_.erase(it);
  }

  void drop_dead() {
    std::erase_if(captured_, [](const Entry& entry) { return entry.storage.expired(); });
    for (auto it = entries_.begin(); it != entries_.end();) {
      it = it->second.storage.expired() ? entries_.erase(it) : std::next(it);
    }
  }

  std::mutex mutex_;
  Map entries_;
  std::vector<Entry> captured_;                       // dropped, but needed
  std::vector<std::unique_lock<std::mutex>> locked_;  // while the process forks
  CacheInfo info_;
  uint64_t clock_ = 0;
};

}  // namespace

CachedPtr cached_of(const at::Tensor& mask, int64_t cols, const Make& make) {
  return Cache::instance().get(mask, cols, make);
}

void trim_cache() { Cache::instance().trim(); }
bool cache_has_room(int64_t bytes) { return Cache::instance().has_room(bytes); }

CacheInfo cache_info() { return Cache::instance().info(); }
void clear_cache() { Cache::instance().clear(); }

}  // namespace masked_ops
