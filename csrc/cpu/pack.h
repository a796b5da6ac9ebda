// Operands into the layout of the microkernel. B becomes panels [k][kNR], A becomes panels [k][kMR], so that the inner
// loop reads both from end to end. Masking happens here: the mask's bits are the predicate of the load, and the zero
// bits that pad each row make the tail of a row a pruned weight like any other.
#pragma once

#include "api.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// A block of a panel of B: columns [column, column + columns), at most kNR, of depths [k0, k0 + depth).
struct Block {
  int64_t column, columns;
  int64_t k0, depth;
};

// The packers below fill a block of B in small steps, which the microkernel takes between multiplications: while those
// keep the arithmetic units busy, the loads, shuffles and stores of packing cost next to nothing. A step also
// prefetches what a later one reads; the first steps of a block do only that.

// B[k][j] = masked(weight)[column + j][k0 + k], for whole groups of four columns and whole vectors of depths (which may
// pass the block's by less than one). A step transposes four rows of one vector each.
class MaskedRows {
 public:
  MaskedRows(const float* weight, int64_t ldw, Bits bits) : weight_(weight), ldw_(ldw), bits_(bits) {}

  void start(const Block& block, float* B) {
    block_ = block;
    B_ = B;
    at_ = ahead_ = Position{};
    const int64_t groups = ceil_div(block.columns, kGroup);
    const int64_t steps = groups * ceil_div(block.depth, L);
    waiting_ = min(steps, tuning::kRowsAhead);
    steps_ = steps + waiting_;
  }

  int64_t steps() const { return steps_; }

  MASKED_OPS_INLINE void step() {
    for (int64_t i = ahead_.row; i < min(ahead_.row + kGroup, block_.columns); ++i) {
      prefetch(row(i) + ahead_.k);
      prefetch(bits(i) + ahead_.k / 64);
    }
    ahead_.advance(block_);
    if (waiting_ > 0) {
      --waiting_;
      return;
    }
    Vec rows[kGroup];
    if (block_.columns - at_.row >= kGroup) {
      MASKED_OPS_UNROLL
      for (int i = 0; i < kGroup; ++i) rows[i] = load(at_.row + i, at_.k);
    } else {
      MASKED_OPS_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        rows[i] = at_.row + i < block_.columns ? load(at_.row + i, at_.k) : Vec::zero();
      }
    }
    store_transposed(rows, B_ + at_.k * tuning::kNR + at_.row, tuning::kNR);
    at_.advance(block_);
  }

 private:
  static constexpr int L = Vec::kLanes;
  static constexpr int kGroup = 4;
  static_assert(tuning::kNR % kGroup == 0);

  // Down the rows, in runs of kPackRun depths: at a power-of-two pitch all rows of a depth compete for the same few
  // lines of a cache; the lines of a run do not.
  struct Position {
    int64_t row = 0, k = 0, run = 0;
    MASKED_OPS_INLINE void advance(const Block& block) {
      k += L;
      if (k >= block.depth || k - run >= tuning::kPackRun) {
        row += kGroup;
        if (row >= block.columns) {
          row = 0;
          run = k;
        } else {
          k = run;
        }
      }
    }
  };

  MASKED_OPS_INLINE const float* row(int64_t i) const { return weight_ + (block_.column + i) * ldw_ + block_.k0; }
  MASKED_OPS_INLINE const uint64_t* bits(int64_t i) const { return bits_.row(block_.column + i) + block_.k0 / 64; }
  MASKED_OPS_INLINE Vec load(int64_t i, int64_t k) const { return Vec::loadu(Vec::predicate(bits(i), k), row(i) + k); }

  const float* weight_;
  int64_t ldw_;
  Bits bits_;
  Block block_ = {};
  float* B_ = nullptr;
  Position at_, ahead_;
  int64_t steps_ = 0, waiting_ = 0;
};

// B[k][j] = masked(matrix)[k0 + k][column + j], or of the plain matrix; zero from the block's columns to kNR. A step
// copies one depth.
template <bool kMasked>
class Columns {
 public:
  Columns(const float* matrix, int64_t ld, Bits bits) : matrix_(matrix), ld_(ld), bits_(bits) {}

  void start(const Block& block, float* B) {
    block_ = block;
    B_ = B;
    at_ = ahead_ = matrix_ + block.k0 * ld_ + block.column;
    at_bits_ = ahead_bits_ = kMasked ? bits_.row(block.k0) : nullptr;
    waiting_ = min(block.depth, tuning::kColumnsAhead);
    steps_ = block.depth + waiting_;
  }

  int64_t steps() const { return steps_; }

  MASKED_OPS_INLINE void step() {
    MASKED_OPS_UNROLL
    for (int j = 0; j < tuning::kNV; ++j) prefetch(ahead_ + j * L);
    ahead_ += ld_;
    if constexpr (kMasked) {
      prefetch(ahead_bits_ + block_.column / 64);
      ahead_bits_ += bits_.stride;
    }
    if (waiting_ > 0) {
      --waiting_;
      return;
    }
    MASKED_OPS_UNROLL
    for (int j = 0; j < tuning::kNV; ++j) {
      Vec v = Vec::zero();
      if (j * L < block_.columns) {
        const auto lanes =
            kMasked ? Vec::predicate(at_bits_, block_.column + j * L) : Vec::first(block_.columns - j * L);
        v = Vec::loadu(lanes, at_ + j * L);
      }
      v.store(B_ + j * L);
    }
    at_ += ld_;
    if constexpr (kMasked) at_bits_ += bits_.stride;
    B_ += tuning::kNR;
  }

 private:
  static constexpr int L = Vec::kLanes;

  const float* matrix_;
  int64_t ld_;
  Bits bits_;
  Block block_ = {};
  float* B_ = nullptr;
  const float *at_ = nullptr, *ahead_ = nullptr;
  const uint64_t *at_bits_ = nullptr, *ahead_bits_ = nullptr;
  int64_t steps_ = 0, waiting_ = 0;
};

// Panels of A have room for whole multiples of this many depths.
constexpr int kDepthOfA = Vec::kLanes * (Vec::kLanes / tuning::kMR);

// One panel of A from the rows of a matrix: A[k][i] = matrix[m0 + i][k0 + k] for i < rows (<= kMR), zero up to kMR and
// up to the next multiple of kDepthOfA depths.
MASKED_OPS_INLINE void pack_row_panel(const float* matrix, int64_t ld, int64_t m0, int64_t rows, int64_t k0,
                                      int64_t depth, float* A) {
  constexpr int L = Vec::kLanes, kMR = tuning::kMR, kParts = L / kMR;
  static_assert(kParts == 1 || kParts == 2);
  const float* from = matrix + m0 * ld + k0;
  for (int64_t k = 0; k < depth; k += kDepthOfA) {
    Vec tile[L];  // a vector of each row, then the next vector of each row
    MASKED_OPS_UNROLL
    for (int i = 0; i < L; ++i) {
      const int64_t at = k + i / kMR * L;
      tile[i] = i % kMR < rows ? Vec::loadu(Vec::first(depth - at), from + i % kMR * ld + at) : Vec::zero();
    }
    transpose(tile);
    float* to = A + k * kMR;
    MASKED_OPS_UNROLL
    for (int i = 0; i < L; ++i) {
      if constexpr (kParts == 1) {
        tile[i].store(to + i * kMR);
      } else {
        tile[i].store_halves(to + i * kMR, to + (L + i) * kMR);
      }
    }
  }
}

// Panels of A from the columns of a matrix: panel[p][k][i] = matrix[k0 + k][m0 + p * height + i] for i < height, up to
// `columns` in all, undefined beyond; panels are `pitch` floats apart.
MASKED_OPS_INLINE void pack_column_panels(const float* matrix, int64_t ld, int64_t m0, int64_t columns, int64_t height,
                                          int64_t k0, int64_t depth, float* A, int64_t pitch) {
  constexpr int64_t kRows = 8;  // at a time: whole cache lines of A
  for (int64_t k = 0; k < depth; k += kRows) {
    const float* from = matrix + (k0 + k) * ld + m0;
    float* to = A + k * tuning::kMR;
    const int64_t rows = min(kRows, depth - k);
    for (int64_t i = 0; i < columns; i += height, to += pitch) {
      if (i + tuning::kMR <= columns) {
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(to + r * tuning::kMR, from + r * ld + i, sizeof(float) * tuning::kMR);
      } else {
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(to + r * tuning::kMR, from + r * ld + i, sizeof(float) * (columns - i));
      }
    }
  }
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
