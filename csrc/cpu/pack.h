// Operands into the layout of the microkernel. B becomes panels [k][kNR], A becomes panels [k][kMR], so that the inner
// loop reads both from end to end. Masking happens here: the mask's bits are the predicate of the load, and the zero
// bits that pad each row make the tail of a row a pruned weight like any other.
#pragma once

#include "elements.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// A block of a panel of B: columns [column, column + columns), at most kNR, of depths [k0, k0 + depth). Depths count
// operands (see elements.h).
struct Block {
  int64_t column, columns;
  int64_t k0, depth;
};

// The packers below fill a block of B in small steps, which the microkernel takes between multiplications: while those
// keep the arithmetic units busy, the loads, shuffles and stores of packing cost next to nothing. A step also
// prefetches what a later one reads; the first steps of a block do only that. Or all() fills it before it is needed.

// B[k][j] = masked(weight)[column + j][k0 + k], for whole groups of four columns and whole vectors of depths (which may
// pass the block's by less than one). A step transposes four rows of one vector each.
template <typename T>
class MaskedRows {
 public:
  static constexpr bool kMasksB = true;
  static constexpr bool kOnTheSide = tuning::kRowsOnTheSide;  // unless all() always takes less
  static constexpr int64_t kFewPanels = tuning::kFewPanels;   // of A, up to which it does

  MaskedRows(const T* weight, int64_t ldw, Bits bits) : weight_(weight), ldw_(ldw), bits_(bits) {}

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
      prefetch(row(i) + ahead_.k * kDepth);
      prefetch(bits(i) + ahead_.k * kDepth / 64);
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

  // All steps at once, with all registers for it: whole vectors of B at a time.
  __attribute__((noinline)) void all() {
    for (int64_t r = 0; r < block_.columns; r += L) {
      for (int64_t k = 0; k < block_.depth; k += L) {
        Vec rows[L];
        if (block_.columns - r >= L) {
          MASKED_OPS_UNROLL
          for (int i = 0; i < L; ++i) {
            rows[i] = load(r + i, k);
            prefetch(row(r + i) + (k + tuning::kVectorsAheadAtOnce * L) * kDepth);
          }
        } else {
          MASKED_OPS_UNROLL
          for (int i = 0; i < L; ++i) rows[i] = r + i < block_.columns ? load(r + i, k) : Vec::zero();
        }
        transpose(rows);
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) rows[i].store(B_ + (k + i) * tuning::kNR + r);
      }
    }
  }

 private:
  static constexpr int L = Vec::kLanes, kDepth = Operand<T>::kDepth;
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

  MASKED_OPS_INLINE int64_t element() const { return block_.k0 * kDepth; }  // the block's first in a row
  MASKED_OPS_INLINE const T* row(int64_t i) const { return weight_ + (block_.column + i) * ldw_ + element(); }
  MASKED_OPS_INLINE const uint64_t* bits(int64_t i) const { return bits_.row(block_.column + i) + element() / 64; }
  MASKED_OPS_INLINE Vec load(int64_t i, int64_t k) const {
    k *= kDepth;
    return Operand<T>::along(bits(i), k, ldw_ - element() - k, row(i) + k);
  }

  const T* weight_;
  int64_t ldw_;
  Bits bits_;
  Block block_ = {};
  float* B_ = nullptr;
  Position at_, ahead_;
  int64_t steps_ = 0, waiting_ = 0;
};

// B[k][j] = masked(matrix)[k0 + k][column + j], or of the plain matrix; zero from the block's columns to kNR. A step
// copies one depth.
template <typename T, bool kMasked>
class Columns {
 public:
  static constexpr bool kMasksB = kMasked;  // else the result of the product is what is masked
  static constexpr bool kOnTheSide = true;
  static constexpr int64_t kFewPanels = 0;

  Columns(const T* matrix, int64_t rows, int64_t ld, Bits bits) : matrix_(matrix), rows_(rows), ld_(ld), bits_(bits) {}

  void start(const Block& block, float* B) {
    block_ = block;
    B_ = B;
    const int64_t row = block.k0 * kDepth;
    left_ = rows_ - row;
    at_ = ahead_ = matrix_ + row * ld_ + block.column;
    at_bits_ = ahead_bits_ = kMasked ? bits_.row(row) : nullptr;
    waiting_ = min(block.depth, tuning::kColumnsAhead);
    steps_ = block.depth + waiting_;
  }

  int64_t steps() const { return steps_; }

  MASKED_OPS_INLINE void step() {
    MASKED_OPS_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < tuning::kNR; j += kLine) prefetch(ahead_ + j);
      ahead_ += ld_;
      if constexpr (kMasked) {
        prefetch(ahead_bits_ + block_.column / 64);
        ahead_bits_ += bits_.stride;
      }
    }
    if (waiting_ > 0) {
      --waiting_;
      return;
    }
    int j = 0;
    if constexpr (Operand<T>::kHasAcrossTwo) {
      if (block_.columns > L && left_ >= kDepth) {
        uint32_t two[kDepth];
        MASKED_OPS_UNROLL
        for (int d = 0; d < kDepth; ++d) {
          two[d] = kMasked ? Operand<T>::predicate_of_two(at_bits_ + d * bits_.stride, block_.column)
                           : Operand<T>::first_of_two(block_.columns);
        }
        Vec v[2];
        Operand<T>::across_two(two, at_, ld_, v);
        v[0].store(B_);
        v[1].store(B_ + L);
        j = 2;
      }
    }
    for (; j < tuning::kNV; ++j) {
      Vec v = Vec::zero();
      const int64_t columns = block_.columns - j * L;
      if (columns > 0) {
        Vec::Predicate lanes[kDepth] = {};
        MASKED_OPS_UNROLL
        for (int d = 0; d < kDepth; ++d) {
          if (d > 0 && left_ <= d) break;
          lanes[d] = kMasked ? Vec::predicate(at_bits_ + d * bits_.stride, block_.column + j * L) : Vec::first(columns);
        }
        v = Operand<T>::across(lanes, columns, at_ + j * L, ld_);
      }
      v.store(B_ + j * L);
    }
    left_ -= kDepth;
    at_ += kDepth * ld_;
    if constexpr (kMasked) at_bits_ += kDepth * bits_.stride;
    B_ += tuning::kNR;
  }

  // All steps at once.
  __attribute__((noinline)) void all() {
    for (int64_t i = steps_; i > 0; --i) step();
  }

 private:
  static constexpr int L = Vec::kLanes, kDepth = Operand<T>::kDepth;
  static constexpr int kLine = 64 / sizeof(T);

  const T* matrix_;
  int64_t rows_, ld_;
  Bits bits_;
  Block block_ = {};
  float* B_ = nullptr;
  const T *at_ = nullptr, *ahead_ = nullptr;
  const uint64_t *at_bits_ = nullptr, *ahead_bits_ = nullptr;
  int64_t left_ = 0;  // rows from at_ on
  int64_t steps_ = 0, waiting_ = 0;
};

// Panels of A have room for whole multiples of this many depths.
constexpr int kDepthOfA = Vec::kLanes * (Vec::kLanes / tuning::kMR);

// One panel of A from the rows of a matrix: A[k][i] = matrix[m0 + i][k0 + k] for i < rows (<= kMR), zero up to kMR and
// up to the next multiple of kDepthOfA depths. The matrix has ld columns.
template <typename T>
MASKED_OPS_INLINE void pack_row_panel(const T* matrix, int64_t ld, int64_t m0, int64_t rows, int64_t k0, int64_t depth,
                                      float* A) {
  constexpr int L = Vec::kLanes, kMR = tuning::kMR, kParts = L / kMR, kDepth = Operand<T>::kDepth;
  static_assert(kParts == 1 || kParts == 2);
  const T* from = matrix + m0 * ld + k0 * kDepth;
  const int64_t elements = min(depth * kDepth, ld - k0 * kDepth);
  for (int64_t k = 0; k < depth; k += kDepthOfA) {
    Vec tile[L];  // a vector of each row, then the next vector of each row
    MASKED_OPS_UNROLL
    for (int i = 0; i < L; ++i) {
      const int64_t at = (k + i / kMR * L) * kDepth;
      prefetch(from + i % kMR * ld + at + tuning::kRowsOfAAhead);
      tile[i] = i % kMR < rows ? Operand<T>::along(elements - at, from + i % kMR * ld + at) : Vec::zero();
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
// `columns` in all, undefined beyond; panels are `pitch` floats apart. The matrix has `elements` rows.
template <typename T>
MASKED_OPS_INLINE void pack_column_panels(const T* matrix, int64_t elements, int64_t ld, int64_t m0, int64_t columns,
                                          int64_t height, int64_t k0, int64_t depth, float* A, int64_t pitch) {
  constexpr int L = Vec::kLanes, kMR = tuning::kMR, kDepth = Operand<T>::kDepth;
  constexpr int64_t kRows = 8;                       // at a time: whole cache lines of A
  const bool whole = L == 2 * kMR && height == kMR;  // a vector holds the columns of two panels
  for (int64_t k = 0; k < depth; k += kRows) {
    const T* from = matrix + (k0 + k) * kDepth * ld + m0;
    const int64_t left = elements - (k0 + k) * kDepth, rows = min(kRows, depth - k);
    float* to = A + k * kMR;
    // What is packed from these columns next.
    const auto fetch = [&](int64_t r, int64_t i) __attribute__((always_inline)) {
      MASKED_OPS_UNROLL
      for (int d = 0; d < kDepth; ++d) prefetch(from + ((kRows + r) * kDepth + d) * ld + i);
    };
    // Operands of row r for n columns from i on.
    const auto operands = [&](int64_t r, int64_t i, int64_t n) __attribute__((always_inline)) {
      Vec::Predicate lanes[kDepth] = {};
      MASKED_OPS_UNROLL
      for (int d = 0; d < kDepth; ++d) lanes[d] = r * kDepth + d < left ? Vec::first(n) : Vec::Predicate(0);
      fetch(r, i);
      return Operand<T>::across(lanes, columns - i, from + r * kDepth * ld + i, ld);
    };
    int64_t i = 0;
    if constexpr (Operand<T>::kHasAcrossTwo) {
      for (; whole && i + 2 * L <= columns; i += 2 * L, to += 4 * pitch) {
        for (int64_t r = 0; r < rows; ++r) {
          uint32_t two[kDepth];
          MASKED_OPS_UNROLL
          for (int d = 0; d < kDepth; ++d) two[d] = r * kDepth + d < left ? ~0u : 0;
          Vec v[2];
          fetch(r, i);
          Operand<T>::across_two(two, from + r * kDepth * ld + i, ld, v);
          v[0].store_halves(to + r * kMR, to + pitch + r * kMR);
          v[1].store_halves(to + 2 * pitch + r * kMR, to + 3 * pitch + r * kMR);
        }
      }
    }
    for (; whole && i + L <= columns; i += L, to += 2 * pitch) {
      for (int64_t r = 0; r < rows; ++r) operands(r, i, L).store_halves(to + r * kMR, to + pitch + r * kMR);
    }
    for (; i < columns; i += height, to += pitch) {
      const int64_t n = min<int64_t>(columns - i, kMR);
      for (int64_t r = 0; r < rows; ++r) operands(r, i, n).storeu(Vec::first(n), to + r * kMR);
    }
  }
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
