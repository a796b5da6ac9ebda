// The remaining weights as decode_sliced reads them: every load whole lines of one stream, and every lookup of a warp
// in different banks of shared memory.
//
// A slice is eight rows. Its steps are 32 values of each row, one a lane. In a strict step lane l has a column whose
// remainder by 32 is l, so that a byte says which one of 8192 columns; in a loose one, any. A row has so many strict
// steps as is cheapest for its slice, and what a lane's columns have beyond them is dealt out to loose steps. Where
// there is nothing left, a value is 0 and its column the lane's first.
//
//   strict step:  value[lane][row], 16 bytes a lane; then column / 32, 8 bytes a lane
//   loose step:   value[lane][row], 16 bytes a lane; then column, 16 bytes a lane
//
// 8192 x 8192 at random: 3.3 bytes a value at density .1, 3.17 at .25, 3.1 at .5.
#pragma once

#include "bits.h"
#include "device.h"

namespace masked_ops::cuda {

inline constexpr int kStrictBytes = kWarp * 24, kLooseBytes = kWarp * 32, kStepValues = kWarp * 16;
inline constexpr int kStrictUnits = kStrictBytes / kSliceUnit, kLooseUnits = kLooseBytes / kSliceUnit;

MASKED_OPS_BOTH int64_t slices_of(int64_t N) { return ceil_div<int64_t>(N, kSliceRows); }
MASKED_OPS_BOTH int64_t slice_segments(int64_t K) { return ceil_div<int64_t>(K, kSliceColumns); }

MASKED_OPS_BOTH int64_t strict_at(const SlicedPiece& piece, int64_t step) {
  return int64_t(piece.at) * kSliceUnit + step * kStrictBytes;
}
MASKED_OPS_BOTH int64_t loose_at(const SlicedPiece& piece, int64_t step) {
  return strict_at(piece, piece.strict) + step * kLooseBytes;
}

}  // namespace masked_ops::cuda
