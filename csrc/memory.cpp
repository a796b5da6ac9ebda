#include "memory.h"

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

}  // namespace masked_ops
