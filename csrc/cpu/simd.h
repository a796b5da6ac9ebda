// A vector of floats and what the kernels do with it: Vec, from the file of the capability. Only the simd files have
// intrinsics, and elements.h.
#pragma once

#include "basics.h"

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// The same vector, which the compiler may not load again for each of its uses: an operand in memory is a load, and
// loads would then outnumber multiply-adds.
MASKED_OPS_INLINE Vec in_register(Vec x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x.v));
#elif defined(__AVX2__)
  __asm__("" : "+x"(x.v));
#endif
  return x;
}

// Without AVX-512, a store of some lanes takes ten times as long as one of all of them.
constexpr bool kSlowPartStores = Vec::kLanes < 16;

// Stores the first N lanes.
template <int N>
MASKED_OPS_INLINE void store_first(Vec x, float* p) {
  if constexpr (N == Vec::kLanes) {
    x.storeu(p);
  } else if constexpr (kSlowPartStores) {
    float lanes[Vec::kLanes];
    x.storeu(lanes);
    std::memcpy(p, lanes, N * sizeof(float));
  } else {
    x.storeu(Vec::first(N), p);
  }
}

// Four rows become columns: four floats each, pitch floats apart, at p.
MASKED_OPS_INLINE void store_transposed(const Vec (&r)[4], float* p, int64_t pitch) {
  Vec quads[4] = {r[0], r[1], r[2], r[3]};
  transpose_quads(quads);
  store_quads(quads, p, pitch);
}

// After the last stream of a task, whose stores go past the caches and may come late.
MASKED_OPS_INLINE void end_streams() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

MASKED_OPS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
MASKED_OPS_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
template <bool kFar>
MASKED_OPS_INLINE void prefetch(const void* p) {
  kFar ? prefetch_l2(p) : prefetch(p);
}

// Eight bytes, loaded here and not where they are used: an address that waits for its index stalls all loads behind it.
MASKED_OPS_INLINE uint64_t load_ahead(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  asm volatile("" : "+r"(word));
  return word;
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
