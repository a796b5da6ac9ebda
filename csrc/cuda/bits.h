// Arithmetic on bits and positions that host and device share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"

namespace masked_ops::cuda {

template <typename T>
MASKED_OPS_BOTH constexpr T ceil_div(T a, T b) {
  return a / b + (a % b != 0);
}

MASKED_OPS_BOTH uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return uint64_t((unsigned __int128)(a)*b >> 64);
#endif
}

// Division of any n < 2^63 by one divisor, without the hundred instructions of a 64-bit division. n * magic / 2^64
// falls short of the quotient by less than 2, so that its floor is off by one at most.
struct Divider {
  uint64_t divisor, magic;

  static Divider by(uint64_t divisor) { return {divisor, ~uint64_t{0} / divisor}; }

  MASKED_OPS_BOTH uint64_t operator()(uint64_t n, uint64_t& remainder) const {
    uint64_t quotient = multiply_high(n, magic);
    remainder = n - quotient * divisor;
    if (remainder >= divisor) {
      ++quotient;
      remainder -= divisor;
    }
    return quotient;
  }
};

// At least count <= 16 bits of a row that begin at bit col; zeros beyond the row's words.
MASKED_OPS_BOTH uint32_t bits_of_row(const uint64_t* row, int64_t words, int64_t col, int count) {
  const int64_t word = col / 64;
  const int shift = int(col % 64);
  uint64_t bits = row[word] >> shift;
  if (shift + count > 64 && word + 1 < words) bits |= row[word + 1] << (64 - shift);
  return uint32_t(bits);
}

// The low 4, 2 or 1 bits spread over the bytes, halves or whole of a 32-bit word, all bits of each.
template <int kElementBytes>
MASKED_OPS_BOTH uint32_t spread_bits(uint32_t bits) {
  if constexpr (kElementBytes == 1) {
    return ((bits & 15) * 0x00204081u & 0x01010101u) * 0xffu;
  } else if constexpr (kElementBytes == 2) {
    return (bits & 1) * 0xffffu | (bits & 2) * 0x7fff8000u;
  } else {
    return 0u - (bits & 1);
  }
}

}  // namespace masked_ops::cuda
