// What every kernel file begins with. Everything lies in a namespace named by the capability, so that several builds of
// one kernel can share a library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "inline.h"

#define MASKED_OPS_STRING_(x) #x
#define MASKED_OPS_STRING(x) MASKED_OPS_STRING_(x)
// GCC unrolls a counted loop whole only when told to; arrays of vectors stay in registers only when it does.
#define MASKED_OPS_UNROLL _Pragma("GCC unroll 32")

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Not std::min: an inline function of the standard library that was compiled for one capability may be the copy that
// the linker keeps for all.
template <typename T>
MASKED_OPS_INLINE constexpr T min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
MASKED_OPS_INLINE constexpr T max(T a, T b) {
  return a > b ? a : b;
}
MASKED_OPS_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The same value, whose origin the compiler cannot see: what depends on it stays where it is used, instead of being
// computed ahead of the branches around and taking registers.
template <typename T>
MASKED_OPS_INLINE T opaque(T x) {
  __asm__("" : "+r"(x));
  return x;
}

// A number as a type, for the argument of a generic lambda.
template <int N>
struct Int {
  static constexpr int value = N;
};

// kernel(Int<n>) for a number from 1 to N that is known only now.
template <int N, typename Kernel>
MASKED_OPS_INLINE void with_int(int64_t n, const Kernel& kernel) {
  if constexpr (N > 1) {
    if (n < N) return with_int<N - 1>(n, kernel);
  }
  kernel(Int<N>());
}

// Calls body with an integer of so many bytes, which are 2, 4 or 8.
template <typename Body>
MASKED_OPS_INLINE void with_word(size_t bytes, const Body& body) {
  switch (bytes) {
    case 2:
      return body(uint16_t());
    case 4:
      return body(uint32_t());
    default:
      return body(uint64_t());
  }
}

using Word16 __attribute__((may_alias)) = uint16_t;
using Word32 __attribute__((may_alias)) = uint32_t;

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
