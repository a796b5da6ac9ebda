// capability: none (compiled once: chooses among the tables that the other files make)
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "sparse_index.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace masked_ops::cpu {

// Declared here rather than in a header: a table exists only where its capability was built.
#define MASKED_OPS_DECLARE(capability) \
  namespace capability {               \
  extern const Kernels table;          \
  }
#ifdef MASKED_OPS_HAVE_AVX512
MASKED_OPS_DECLARE(AVX512)
#endif
#ifdef MASKED_OPS_HAVE_AVX2
MASKED_OPS_DECLARE(AVX2)
#endif
#ifdef MASKED_OPS_HAVE_DEFAULT
MASKED_OPS_DECLARE(DEFAULT)
#endif
#undef MASKED_OPS_DECLARE

namespace {

struct Available {
  const Kernels* tables[4] = {};

  Available() {
    [[maybe_unused]] int n = 0;
#ifdef MASKED_OPS_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
      tables[n++] = &AVX512::table;
    }
#endif
#ifdef MASKED_OPS_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
      tables[n++] = &AVX2::table;
    }
#endif
#ifdef MASKED_OPS_HAVE_DEFAULT
    tables[n++] = &DEFAULT::table;
#endif
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> table{available().tables[0]};
  return table;
}

std::atomic<bool>& into_l2() {
#if defined(__x86_64__)
  static std::atomic<bool> value{__builtin_cpu_is("amdfam19h") != 0};
#else
  static std::atomic<bool> value{false};
#endif
  return value;
}

struct Blocks {
  void* data[static_cast<int>(Slot::kCount)] = {};
  size_t bytes[static_cast<int>(Slot::kCount)] = {};

  void release() {
    for (int i = 0; i < static_cast<int>(Slot::kCount); ++i) {
      std::free(data[i]);
      data[i] = nullptr;
      bytes[i] = 0;
    }
  }
  ~Blocks() { release(); }
};

thread_local Blocks blocks;

}  // namespace

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

const Kernels* const* available_kernels() { return available().tables; }

bool select_kernels(const char* capability) {
  for (const Kernels* const* table = available_kernels(); *table; ++table) {
    if (std::strcmp((*table)->capability, capability) == 0) {
      selected().store(*table);
      return true;
    }
  }
  return false;
}

bool fetches_into_l2() { return into_l2().load(std::memory_order_relaxed); }

bool set_fetches_into_l2(bool wanted) { return into_l2().exchange(wanted); }

OutOfMemory::OutOfMemory(size_t bytes, const char* purpose) {
  std::snprintf(message_, sizeof(message_), "masked_ops: can't allocate memory: %zu bytes for %s", bytes, purpose);
}
const char* OutOfMemory::what() const noexcept { return message_; }

void* scratch(Slot slot, size_t bytes) {
  constexpr const char* kPurposes[] = {"a packed operand",
                                       "a packed operand",
                                       "sums",
                                       "values",
                                       "places of values",
                                       "places of values",
                                       "the pieces of a weight",
                                       "a table",
                                       "a weight laid out",
                                       "a part of a result"};
  static_assert(std::size(kPurposes) == static_cast<size_t>(Slot::kCount));
#ifdef MASKED_OPS_FENCE  // ends where the request does, but for vectors' alignment
  constexpr size_t kAlignment = 64;
  const auto fits = [&](size_t held) { return held == bytes; };
  const size_t rounded = bytes;
#else
  constexpr size_t kAlignment = 4096;
  const auto fits = [&](size_t held) { return held >= bytes; };
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
#endif
  const int i = static_cast<int>(slot);
  if (!fits(blocks.bytes[i])) {
    std::free(blocks.data[i]);
    blocks.data[i] = nullptr;
    blocks.bytes[i] = 0;
    blocks.data[i] = std::aligned_alloc(kAlignment, rounded);
    if (!blocks.data[i]) throw OutOfMemory(rounded, kPurposes[i]);
    blocks.bytes[i] = rounded;
  }
#ifdef __SANITIZE_ADDRESS__  // what larger requests left behind the end is out of bounds
  ASAN_UNPOISON_MEMORY_REGION(blocks.data[i], bytes);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(blocks.data[i]) + bytes, blocks.bytes[i] - bytes);
#endif
  return blocks.data[i];
}

void release_scratch() { blocks.release(); }

void free_index(SparseIndex* index) { std::free(index); }

size_t index_bytes(const SparseIndex& index) { return index.bytes; }

}  // namespace masked_ops::cpu
