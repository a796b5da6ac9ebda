// Operands into the layout of the microkernel. B becomes panels [k][kNR], A becomes panels [k][kMR], so that the inner
// loop reads both from end to end. Masking happens here: the mask's bits are the predicate of the load, and the zero
// bits that pad each row make the tail of a row a pruned weight like any other.
#pragma once

#include "api.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Packed B from the rows of a masked weight: B[k][j] = masked(weight)[n0 + j][k0 + k] for j < columns (<= kNR), zero
// for the rest of the last vector. k0 is a multiple of the lanes; depths up to the next such multiple are written.
MASKED_OPS_INLINE void pack_rows(const float* weight, int64_t ldw, Bits bits, int64_t n0, int64_t columns, int64_t k0,
                                 int64_t depth, float* B) {
  constexpr int L = Vec::kLanes;
  for (int64_t j = 0; j < columns; j += L) {
    const int64_t rows = min<int64_t>(L, columns - j);
    for (int64_t k = 0; k < depth; k += L) {
      const float* w = weight + (n0 + j) * ldw + k0 + k;
      Vec tile[L];
      if (rows == L) {
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) {
          tile[i] = Vec::loadu(Vec::predicate(bits.row(n0 + j + i), k0 + k), w + i * ldw);
          prefetch(w + i * ldw + tuning::kPrefetch);
        }
      } else {
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) {
          tile[i] = i < rows ? Vec::loadu(Vec::predicate(bits.row(n0 + j + i), k0 + k), w + i * ldw) : Vec::zero();
        }
      }
      transpose(tile);
      MASKED_OPS_UNROLL
      for (int i = 0; i < L; ++i) tile[i].store(B + (k + i) * tuning::kNR + j);
    }
  }
}

// Packed B from the columns of a masked weight: B[k][j] = masked(weight)[k0 + k][c0 + j].
MASKED_OPS_INLINE void pack_columns(const float* weight, int64_t ldw, Bits bits, int64_t c0, int64_t columns,
                                    int64_t k0, int64_t depth, float* B) {
  constexpr int L = Vec::kLanes;
  for (int64_t k = 0; k < depth; ++k) {
    const uint64_t* row = bits.row(k0 + k);
    const float* w = weight + (k0 + k) * ldw + c0;
    for (int64_t j = 0; j < columns; j += L) {
      Vec::loadu(Vec::predicate(row, c0 + j), w + j).store(B + k * tuning::kNR + j);
    }
  }
}

// Packed B from the columns of a plain matrix.
MASKED_OPS_INLINE void pack_columns(const float* matrix, int64_t ld, int64_t c0, int64_t columns, int64_t k0,
                                    int64_t depth, float* B) {
  constexpr int L = Vec::kLanes;
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = matrix + (k0 + k) * ld + c0;
    for (int64_t j = 0; j < columns; j += L) {
      Vec::loadu(Vec::first(columns - j), row + j).store(B + k * tuning::kNR + j);
    }
  }
}

// One packed panel of A from the rows of a matrix: A[k][i] = matrix[m0 + i][k] for i < rows, 0 up to kMR.
MASKED_OPS_INLINE void pack_row_panel(const float* matrix, int64_t ld, int64_t m0, int64_t rows, int64_t k0,
                                      int64_t depth, float* A) {
  constexpr int L = Vec::kLanes;
  constexpr int kTileRows = min(L, tuning::kMR);
  for (int64_t i0 = 0; i0 < tuning::kMR; i0 += L) {
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t lanes = min<int64_t>(L, depth - k);
      Vec tile[L];
      MASKED_OPS_UNROLL
      for (int i = 0; i < L; ++i) {
        const bool inside = i < kTileRows && i0 + i < rows;
        tile[i] = inside ? Vec::loadu(Vec::first(lanes), matrix + (m0 + i0 + i) * ld + k0 + k) : Vec::zero();
      }
      transpose(tile);
      for (int64_t i = 0; i < lanes; ++i) {
        tile[i].storeu(Vec::first(tuning::kMR - i0), A + (k0 + k + i) * tuning::kMR + i0);
      }
    }
  }
}

// One packed panel of A from the columns of a matrix: A[k][i] = matrix[k][m0 + i] for i < columns, 0 up to kMR.
MASKED_OPS_INLINE void pack_column_panel(const float* matrix, int64_t ld, int64_t m0, int64_t columns, int64_t k0,
                                         int64_t depth, float* A) {
  constexpr int L = Vec::kLanes;
  for (int64_t k = k0; k < k0 + depth; ++k) {
    for (int64_t i = 0; i < tuning::kMR; i += L) {
      Vec::loadu(Vec::first(columns - i), matrix + k * ld + m0 + i)
          .storeu(Vec::first(tuning::kMR - i), A + k * tuning::kMR + i);
    }
  }
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
