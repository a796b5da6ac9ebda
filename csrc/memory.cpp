#include "memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/safe_numerics.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace masked_ops {
namespace {

// The C library gives memory from 32 MB on back to the system when it is freed, and less of it when more is free than
// twice the largest piece, so that such a result is mapped anew: 16384 page faults for the gradient of a 4096 x 4096
// weight, which outlast its computing. Huge pages make 32 of them, which the system zeroes: 13.8 ms at M = 128. In
// memory that is kept it is 8.5. (MADV_FREE on what is kept would let the system have it back when it needs memory, and
// costs up to 0.7 of that.)
constexpr size_t kLargeBytes = size_t{8} << 20;
#ifdef MASKED_OPS_FENCE
constexpr size_t kHugePage = 1;  // memory ends where the result does
#else
constexpr size_t kHugePage = size_t{2} << 20;
#endif
constexpr size_t kKeptResults = 32;  // of all threads together: those of a model come back at once, at zero_grad

// Whole huge pages.
struct Block {
  at::DataPtr memory;
  char* begin;
  size_t bytes;

  explicit Block(size_t bytes)
      : memory(c10::GetCPUAllocator()->allocate(bytes + kHugePage - 1)),
        begin(reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + kHugePage - 1) & ~(kHugePage - 1))),
        bytes(bytes) {
#if defined(MADV_HUGEPAGE)
    madvise(begin, bytes, MADV_HUGEPAGE);  // advice: where it is refused, the pages are small
#endif
  }
};

// Without locks: a child that is forked in the middle loses a block at worst.
class KeptResults {
 public:
  // A block of exactly this size, or null.
  Block* take(size_t bytes) {
    for (auto& slot : slots_) {
      Block* const block = slot.exchange(nullptr);
      if (!block) continue;
      if (block->bytes == bytes) {
        bytes_ -= int64_t(bytes);
        return block;
      }
      put(block);
    }
    return nullptr;
  }
  void keep(Block* block) {
    bytes_ += int64_t(block->bytes);
    if (int64_t(block->bytes) > limit()) return drop(block);
    put(block);
    for (size_t turn = 0; turn < kKeptResults && bytes_ > limit(); ++turn) {
      drop(slots_[oldest_++ % kKeptResults].exchange(nullptr));
    }
  }
  void release() {
    for (auto& slot : slots_) drop(slot.exchange(nullptr));
  }
  int64_t bytes() const { return bytes_; }

 private:
  static int64_t limit() {
    static const int64_t bytes = [] {
      const char* set = std::getenv("MASKED_OPS_RESULT_BYTES");
      return set && *set ? std::atoll(set) : int64_t{256} << 20;
    }();
    return bytes;
  }
  void put(Block* block) {
    for (auto& slot : slots_) {
      Block* none = nullptr;
      if (slot.compare_exchange_strong(none, block)) return;
    }
    drop(slots_[oldest_++ % kKeptResults].exchange(block));
  }
  void drop(Block* block) {
    if (!block) return;
    bytes_ -= int64_t(block->bytes);
    delete block;
  }

  std::array<std::atomic<Block*>, kKeptResults> slots_{};
  std::atomic<int64_t> bytes_ = 0;
  std::atomic<size_t> oldest_ = 0;  // the next to go, in turn
};

constinit KeptResults kept_results;  // never destroyed: results may outlive it

Block* block_of(size_t bytes) {
  if (Block* const kept = kept_results.take(bytes)) return kept;
  try {
    return new Block(bytes);
  } catch (const c10::Error&) {  // out of memory, some of which may be kept here
    kept_results.release();
  }
  return new Block(bytes);
}

c10::Storage large_storage(size_t bytes) {
  Block* const block = block_of((bytes + kHugePage - 1) & ~(kHugePage - 1));
  const auto free = [](void* context) { kept_results.keep(static_cast<Block*>(context)); };
  return {c10::Storage::use_byte_size_t(), bytes, at::DataPtr(block->begin, block, free, at::kCPU),
          c10::GetCPUAllocator(), /*resizable=*/true};
}

// Not sizes whose product overflows: at::empty says so.
bool is_large(at::IntArrayRef sizes, const at::TensorOptions& options, uint64_t* bytes) {
  return options.device().is_cpu() && !c10::safe_multiplies_u64(sizes, bytes) &&
         !c10::mul_overflows(*bytes, uint64_t{options.dtype().itemsize()}, bytes) && *bytes >= kLargeBytes &&
         *bytes < uint64_t{1} << 62;
}

thread_local c10::Storage kept_scratch;  // none while it is lent

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  uint64_t bytes;
  if (!is_large(sizes, options, &bytes)) return at::empty(sizes, options, format);
  at::IntArrayRef strides = {};  // contiguous
  std::vector<int64_t> last;
  if (format == at::MemoryFormat::ChannelsLast) strides = last = c10::get_channels_last_strides_2d(sizes);
  if (format == at::MemoryFormat::ChannelsLast3d) strides = last = c10::get_channels_last_strides_3d(sizes);
  return at::empty({0}, options).set_(large_storage(bytes), 0, sizes, strides);
}

at::Tensor empty_result_like(const at::Tensor& like) {
  uint64_t bytes;
  if (!is_large(like.sizes(), like.options(), &bytes)) return at::empty_like(like);
  return at::empty({0}, like.options()).set_(large_storage(bytes), 0, like.sizes(), like.strides());
}

int64_t kept_result_bytes() { return kept_results.bytes(); }
void release_kept_results() { kept_results.release(); }

void release_kept_scratch() { kept_scratch = {}; }

Scratch::Scratch(const at::Tensor& like) {
  const size_t bytes = like.nbytes();
#ifdef MASKED_OPS_FENCE
  const bool fresh = true;
#else
  const bool fresh = bytes >= kLargeBytes;
#endif
  if (fresh) {
    tensor_ = empty_result_like(like);
    return;
  }
  c10::Storage lent = std::move(kept_scratch);
  if (!lent || lent.nbytes() < bytes) {
    lent = bytes >= kHugePage ? large_storage(bytes)
                              : at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte)).storage();
  }
  tensor_ = at::empty({0}, like.options()).set_(std::move(lent), 0, like.sizes(), like.strides());
}

Scratch::~Scratch() {
  c10::Storage storage = tensor_.storage();
  tensor_.reset();
  const bool returned = storage.use_count() == 1;
  if (returned && storage.nbytes() < kLargeBytes && (!kept_scratch || kept_scratch.nbytes() < storage.nbytes())) {
    kept_scratch = std::move(storage);
  }
}

}  // namespace masked_ops
