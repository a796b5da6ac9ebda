// A linear layer for a few rows of input, where a weight is used too seldom to be worth packing: the weight streams by
// as it lies, its bits the predicate of the load, and what it meets is small enough for the caches. Elements of 16 bits
// become operands (elements.h) as they are loaded. One file for each of the three products.
#pragma once

#include "elements.h"
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Rows of input that are taken at once.
constexpr int kMaxRows = tuning::kSmallTile;

// Tiles of equal height, at most kMaxRows.
struct RowTiles {
  int64_t rows, count, height;
  explicit RowTiles(int64_t M) : rows(M), count(ceil_div(M, kMaxRows)), height(ceil_div(M, count)) {}
  int64_t begin(int64_t tile) const { return tile * height; }
  int64_t size(int64_t tile) const { return min(height, rows - tile * height); }
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
