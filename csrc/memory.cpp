#include "memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace masked_ops {
namespace {

// The C library gives memory of this size back to the system when it is freed, so that each result is mapped anew:
// 16384 page faults for the gradient of a 4096 x 4096 weight, which outlast its computing by far. Huge pages make 32 of
// them.
constexpr size_t kLargeBytes = size_t{32} << 20;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

constexpr size_t kKeptBytes = size_t{64} << 20;

thread_local c10::Storage kept;  // none while it is lent

}  // namespace

at::Tensor on_huge_pages(at::Tensor fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (fresh.is_cpu() && fresh.nbytes() >= kLargeBytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t last = (begin + fresh.nbytes()) & ~(kHugePage - 1);
    // Advice: where it is refused, the pages are small.
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

void release_kept() { kept = {}; }

Scratch::Scratch(const at::Tensor& like) {
  const size_t bytes = like.nbytes();
  if (bytes > kKeptBytes) {
    tensor_ = on_huge_pages(at::empty_like(like));
    return;
  }
  c10::Storage lent = std::move(kept);
  if (!lent || lent.nbytes() < bytes) {
    lent = on_huge_pages(at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte))).storage();
  }
  tensor_ = at::empty({0}, like.options()).set_(std::move(lent), 0, like.sizes(), like.strides());
}

Scratch::~Scratch() {
  c10::Storage storage = tensor_.storage();
  tensor_.reset();
  const bool returned = storage.use_count() == 1;
  if (returned && storage.nbytes() <= kKeptBytes && (!kept || kept.nbytes() < storage.nbytes())) {
    kept = std::move(storage);
  }
}

}  // namespace masked_ops
