// Walks the remaining weights of a mask: a warp takes kCompressWords words of one row, a word at a time, and lane l has
// its bits l and 32 + l, so that neighbours lie next to each other on the dense side and among the values.
#pragma once

#include "bits.h"
#include "device.h"
#include "tuning.h"

namespace masked_ops::cuda {

struct Pieces {
  const uint64_t* words;
  const int64_t* offsets;
  int64_t rows, cols;
  Divider per_row;

  static Pieces of(const uint64_t* words, const int64_t* offsets, int64_t rows, int64_t cols) {
    const int64_t per_row = ceil_div<int64_t>(words_per_row(cols), tuning::kCompressWords);
    return {words, offsets, rows, cols, Divider::by(per_row)};
  }
  MASKED_OPS_BOTH int64_t count() const { return rows * int64_t(per_row.divisor); }
  int64_t blocks() const { return ceil_div<int64_t>(count(), tuning::kPassThreads / kWarp); }
};

// Calls visit(row, col, set, position) for all columns of the warp's piece, a lane for each; position is where the
// value of this column is, or would be.
template <typename Visit>
MASKED_OPS_DEVICE void for_columns(const Pieces& pieces, const Visit& visit) {
  int64_t piece = (int64_t(blockIdx.x) * tuning::kPassThreads + threadIdx.x) / kWarp;
  const bool there = piece < pieces.count();
  if (!there) piece = 0;  // and no early exit: warps stay whole for warp_sum, and nothing is spilled
  const int lane = threadIdx.x % kWarp;
  const uint32_t below = (1u << lane) - 1;
  uint64_t in_row;
  const int64_t row = pieces.per_row(piece, in_row), stride = words_per_row(pieces.cols);
  const int64_t first = int64_t(in_row) * tuning::kCompressWords;
  const uint64_t* bits = pieces.words + row * stride;
  int64_t before = 0;
  for (int64_t w = lane; w < first; w += kWarp) before += __popcll(bits[w]);
  int64_t position = pieces.offsets[row] + warp_sum(before);
  int64_t last = first + tuning::kCompressWords < stride ? first + tuning::kCompressWords : stride;
  if (!there) last = first;
#pragma unroll 4
  for (int64_t w = first; w < last; ++w) {
    const uint64_t word = bits[w];
    const uint32_t half[2] = {uint32_t(word), uint32_t(word >> 32)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t col = w * 64 + h * 32 + lane;
      if (col < pieces.cols) visit(row, col, half[h] >> lane & 1, position + __popc(half[h] & below));
      position += __popc(half[h]);
    }
  }
}

}  // namespace masked_ops::cuda
