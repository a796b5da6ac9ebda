// The remaining weights as decode_tiles reads them: by tiles of 64 rows and 64 columns, as operands of the tensor
// cores.
//
// A tile is 64 words of two weights for every lane: word 16 kk + 4 mt + r is register r of what lane l holds of
// A[16 mt ..][16 kk ..] for mma.m16n8k16, its row l / 4 (+ 8 for odd r), and its columns 4 (l % 4) + 2 (r / 2) and one
// more: the contraction may run in any order, and so a lane has four neighbouring columns. Which of a lane's 128 places
// are taken is told by as many bits; its values follow in the order of their places.
//
//   the bits:       16 bytes a lane, of which 32 bits are the places of one kk
//   strict batches: the next four values of each lane, 8 bytes
//   loose steps:    a value of any lane's, and above it its slot: its number among the lane's values * 128 + 4 * the
//   lane
//
// A tile has so many strict batches as is cheapest, and what lanes have beyond them is dealt out to loose steps. Where
// nothing is left for a lane or a step, what is there is not used, or is there twice. A tile of so many values that
// this takes more than its words is dense: four words a lane, 16 bytes, one after the other.
#pragma once

#include "bits.h"
#include "device.h"

namespace masked_ops::cuda {

inline constexpr int kBatch = 4;  // strict values of a lane
inline constexpr int kBitsBytes = kWarp * 16, kBatchBytes = kWarp * 2 * kBatch, kLooseStepBytes = kWarp * 4;
inline constexpr int kBitsUnits = kBitsBytes / kTileUnit, kBatchUnits = kBatchBytes / kTileUnit;
inline constexpr int kLooseUnits = kLooseStepBytes / kTileUnit;
inline constexpr int kTileWords = 64, kDenseUnits = kTileWords * kWarp * 4 / kTileUnit;
inline constexpr int kDense = 0xffff;       // in the place of batches
inline constexpr int kMostLaneValues = 96;  // in a tile that is not dense
inline constexpr int kLanePieces = 8;       // rows of a lane, eight apart, of each of which it has four columns in 16

MASKED_OPS_BOTH int64_t groups_of(int64_t N) { return ceil_div<int64_t>(N, kTileSide); }
MASKED_OPS_BOTH int64_t tiles_of(int64_t K) { return ceil_div<int64_t>(K, kTileSide); }

MASKED_OPS_BOTH uint32_t tile_units(const TilePiece& tile) {
  if (tile.batches == kDense) return kDenseUnits;
  const bool empty = tile.batches == 0 && tile.loose == 0;
  return empty ? 0 : kBitsUnits + tile.batches * kBatchUnits + tile.loose * kLooseUnits;
}

}  // namespace masked_ops::cuda
