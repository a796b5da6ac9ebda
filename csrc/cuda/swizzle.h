// Where a byte of a tile in shared memory lies, such that the eight rows of a matrix that ldmatrix reads at once are in
// eight different groups of banks.
#pragma once

#include "bits.h"

namespace masked_ops::cuda {

// Byte `byte` of row `row` of a tile whose rows have kRowBytes, a multiple of 128: the 16-byte chunks of every eight
// rows are exchanged. With rows of 128 bytes and a tile aligned to 1024, this is the hardware's 128-byte swizzle.
template <int kRowBytes>
MASKED_OPS_BOTH constexpr uint32_t swizzled(uint32_t row, uint32_t byte) {
  static_assert(kRowBytes % 128 == 0);
  return row * kRowBytes + (byte ^ (row & 7) << 4);
}

}  // namespace masked_ops::cuda
