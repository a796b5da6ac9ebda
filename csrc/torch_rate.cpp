#include "torch_rate.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdint>

#include "cpu/api.h"

namespace masked_ops {
namespace {

#ifdef __x86_64__
// The registers of leaf 7: zero where there is no such subleaf.
struct Leaf7 {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit Leaf7(unsigned subleaf) { __get_cpuid_count(7, subleaf, &a, &b, &c, &d); }
};

// Whether the system saves the registers of AMX.
bool saves_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;
  uint32_t low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kTiles = 0x60000;
  return (low & kTiles) == kTiles;
}

Rate find(bool half) {
  const Leaf7 zero(0), one(1);
  const bool tiles = zero.d >> 24 & (half ? one.a >> 21 : zero.d >> 22) & 1;
  const bool dots = (half ? zero.d >> 23 : one.a >> 5) & 1;
  return tiles && saves_tiles() ? Rate::kTiles : dots ? Rate::kDotProducts : Rate::kConverted;
}
#else
Rate find(bool) { return Rate::kDotProducts; }  // not known
#endif

std::atomic<Rate>& rate_of(at::ScalarType dtype) {
  static std::atomic<Rate> rates[2] = {find(false), find(true)};
  return rates[dtype == at::kHalf];
}

}  // namespace

Rate torch_rate(at::ScalarType dtype) {
#ifdef __x86_64__
  if (cpu::kernels().lanes < 16) return Rate::kConverted;  // all of these CPUs have AVX-512; tests play one without
#endif
  return rate_of(dtype).load(std::memory_order_relaxed);
}

Rate set_torch_rate(at::ScalarType dtype, Rate rate) { return rate_of(dtype).exchange(rate); }

}  // namespace masked_ops
