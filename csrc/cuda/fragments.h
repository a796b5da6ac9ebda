// The mask in the order of the tensor cores' operands. A fragment is what one thread of 128 holds of a 64x64 tile of
// the weight (or of its transpose) as operand A of four products with k = 16, of wgmma or of mma.m16n8k16 by four
// warps: 16 registers of two elements, two neighbours in a row each. Its mask is one word, whose bits are laid out such
// that a shift and a prmt make the masks of two registers. As operand B of mma.m16n8k16 the same registers serve two
// products: registers 0 and 2 of four the one, 1 and 3 the other.
//
// Words are stored as [row tile][column tile][thread]; beyond the matrix their bits are zero.
#pragma once

#include "bits.h"

namespace masked_ops::cuda {

inline constexpr int kFragmentTile = 64, kFragmentThreads = 128;
inline constexpr int kFragmentTileBytes = kFragmentThreads * 4;

MASKED_OPS_BOTH constexpr int fragment_row(int thread, int reg) {
  return thread / 32 * 16 + thread % 32 / 4 + reg % 2 * 8;
}
MASKED_OPS_BOTH constexpr int fragment_col(int thread, int reg, int half) {
  return reg / 4 * 16 + reg / 2 % 2 * 8 + thread % 4 * 2 + half;
}
// Registers 2 s and 2 s + 1 take the top bits of the word's bytes after a shift by s: bytes 0 and 1, bytes 2 and 3.
MASKED_OPS_BOTH constexpr int fragment_bit(int reg, int half) { return reg % 2 * 16 + half * 8 + 7 - reg / 2; }

// Tiles along a side.
MASKED_OPS_BOTH constexpr int64_t fragment_tiles(int64_t side) { return ceil_div<int64_t>(side, kFragmentTile); }

}  // namespace masked_ops::cuda
