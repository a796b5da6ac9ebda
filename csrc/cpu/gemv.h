// A linear layer for a few rows of input, where a weight is used too seldom to be worth packing: the weight streams by
// as it lies, its bits the predicate of the load. One file for each of the three products.
//
// Forward and grad_input take it in chunks of columns, so narrow that the operands (elements.h) of all rows of input,
// or the sums of their gradients, stay in L1 while a block of rows passes; and in a chunk a few rows at a time, as many
// as leave room in registers for what they are multiplied with. What comes next in that order is fetched ahead between
// the multiplications, evenly: memory is the limit, and idle whenever nothing is asked of it.
#pragma once

#include "elements.h"
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Rows of input that are taken at once, and rows (of operands) of the weight beside them.
constexpr int kMaxRows = tuning::kSmallTile;
constexpr int weight_rows(int rows) { return min(tuning::kSmallSums / rows, 4); }
constexpr bool is_group(int weights) {
  for (int rows = 1; rows <= kMaxRows; ++rows) {
    if (weight_rows(rows) == weights) return true;
  }
  return weights == 1;
}

// Tiles of equal height.
struct RowTiles {
  int64_t rows, count, height;
  explicit RowTiles(int64_t M, int64_t most = kMaxRows)
      : rows(M), count(ceil_div(M, most)), height(ceil_div(M, count)) {}
  int64_t begin(int64_t tile) const { return tile * height; }
  int64_t size(int64_t tile) const { return min(height, rows - tile * height); }
};

// Rows of floats beside the weight, cut into chunks of equal width: in each the tiles, in each
// [columns / lanes][row][lane].
struct Chunks {
  int64_t rows, columns, width;  // columns: whole vectors

  // At least so many chunks.
  Chunks(int64_t M, int64_t columns, int64_t widest, int64_t least = 1)
      : rows(M),
        columns(ceil_div(columns, Vec::kLanes) * Vec::kLanes),
        width(ceil_div(ceil_div(columns, max(ceil_div(columns, widest), least)), 64) * 64) {}
  int64_t count() const { return ceil_div(columns, width); }
  int64_t size() const { return rows * columns; }
  int64_t size(int64_t k) const { return min(width, columns - k); }
  float* at(float* first, int64_t k, int64_t row) const { return first + k * rows + row * size(k); }
};

// The way through an area of a weight: down a block of rows in a chunk of columns, then the next chunk, then the next
// block. A step takes up to `most` groups of `group` rows each, or, where a block has fewer rows left, of `unit` rows.
struct Walk {
  int64_t group, unit, most, block, width;
  int64_t top, end;     // rows, from this block's first on
  int64_t left, right;  // columns
  int64_t row = top, column = left;

  bool done() const { return top >= end; }
  int64_t rows_left() const { return min(top + block, end) - row; }
  int64_t group_rows() const { return rows_left() < group ? unit : group; }
  int64_t groups() const { return most == 1 ? 1 : min(most, max<int64_t>(rows_left() / group_rows(), 1)); }
  int64_t rows() const { return groups() * group_rows(); }
  void advance() {
    row += rows();
    if (row < min(top + block, end)) return;
    column += width;
    if (column >= right) {
      column = left;
      top += block;
    }
    row = top;
  }
};

// The step of a walk whose columns are fetched ahead while those of `from` are used.
inline Walk ahead_of(Walk from, int64_t bytes_of_step) {
  for (int64_t i = max<int64_t>(tuning::kSmallAhead / bytes_of_step, 1); i > 0 && !from.done(); --i) from.advance();
  return from;
}

// Groups of a step, of which each has so many bytes: short rows, many of them.
inline int64_t groups_of_step(int64_t bytes) { return max<int64_t>(tuning::kSmallStep / max<int64_t>(bytes, 1), 1); }

// Whether what comes next is fetched ahead, or left to the hardware.
inline bool fetches_ahead(int64_t M, bool cached, int64_t bytes_of_row) {
  return M > 1 || !cached || bytes_of_row < tuning::kLongRow;
}

// A single row of input leaves time to spare: one row of the weight at a time is what memory likes best; in caches,
// several have shorter chains.
inline int64_t group_rows(const RowTiles& tiles, bool cached) {
  return tiles.rows == 1 && !cached ? 1 : weight_rows(int(tiles.height));
}

// Kernel<rows of input, rows of the weight, T>::run for each pair that there is.
template <template <int, int, typename> typename Kernel, typename T>
struct KernelTable {
  using Function = decltype(&Kernel<1, 1, T>::run);
  Function at[kMaxRows][4] = {};

  constexpr KernelTable() { fill<kMaxRows, 4>(); }
  template <int M, int R>
  constexpr void fill() {
    if constexpr (is_group(R) && M * R <= tuning::kSmallSums) at[M - 1][R - 1] = Kernel<M, R, T>::run;
    if constexpr (R > 1) {
      fill<M, R - 1>();
    } else if constexpr (M > 1) {
      fill<M - 1, 4>();
    }
  }
  Function operator()(int64_t rows, int64_t weights) const { return at[rows - 1][weights - 1]; }
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
