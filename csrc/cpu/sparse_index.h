// The remaining weights of a matrix in the order of spmm and sddmm: panels of rows, in them blocks of columns, in them
// rows by their number of weights. Panel and block make a tile; its rows that have weights are segments; equal ones, a
// run.
//
// Rows that follow each other and share their columns in a block are taken kBlockRows at a time: their columns stand
// once, and a run of such has the segments of all first rows, then those of all second rows, and so on.
//
// A block of columns is as wide as a block of packed input fits into L1, and a column's number in it fits into a byte;
// of a convolution, it is a number of conv_geometry.h. A run's loops all have one length. The values stay in row-major
// order, and a segment knows where its own begin. This file is the same for all capabilities.
#pragma once

#include "api.h"

namespace masked_ops::cpu {

// Columns of a block: at most 256, and so many that a row has a dozen weights or more in one; wider blocks have
// narrower tiles, which broadcast each value for fewer FMAs.
MASKED_OPS_INLINE constexpr int64_t block_cols(double density) {
  return density >= 0.25 ? 64 : density >= 0.07 ? 128 : 256;
}

struct SparseIndex {
  struct Tile {  // where it begins in the arrays below; it ends where the next one begins
    int64_t entry, segment, run;
  };
  struct Run {
    uint16_t count;  // weights of each segment, 1 to 256
    uint16_t segments;
    uint16_t rows;  // that share them, 1 or kBlockRows: times as many segments
  };
  struct Segment {
    uint32_t row;    // in the panel
    uint32_t value;  // of its first weight: from the panel's first value; transposed, from the tile's
  };

  int64_t rows, cols;  // of the matrix that spmm multiplies with: weight, or its transpose
  int64_t group_rows;  // no panel has rows of two groups; all rows, but for grouped convolutions
  int64_t panel_rows, panels;
  int64_t block_cols, blocks;
  int64_t nnz;
  bool transposed;
  size_t bytes;

  const int64_t* panel_values;  // [panels] position of a panel's first value, if not transposed
  const Tile* tiles;            // [panels * blocks + 1]
  const Segment* segments;      // and one more, so that a loop may look ahead
  const uint32_t* positions;    // transposed: of each entry's value among the row-major values
  const Run* runs;
  const uint8_t* columns;  // in the block, of each entry; and kLookahead bytes more

  // Loops look a segment ahead, eight columns at a time; sddmm, which takes segments in pieces, from where the last
  // piece of 256 columns begins.
  static constexpr int64_t kLookahead = 256 + 8;
  static constexpr int kBlockRows = 4;

  MASKED_OPS_INLINE int64_t panels_of_group() const { return (group_rows + panel_rows - 1) / panel_rows; }
  // The first row of a panel; of panel = panels, the end of the last.
  MASKED_OPS_INLINE int64_t row_of(int64_t panel) const {
    return panel / panels_of_group() * group_rows + panel % panels_of_group() * panel_rows;
  }
  MASKED_OPS_INLINE int64_t rows_of(int64_t panel) const {
    const int64_t left = group_rows - panel % panels_of_group() * panel_rows;
    return left < panel_rows ? left : panel_rows;
  }
};

}  // namespace masked_ops::cpu
