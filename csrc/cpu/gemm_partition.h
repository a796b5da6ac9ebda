// How the masked GEMM lays out A and shares out C; see gemm.cpp.
#pragma once

#include "pack.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// The rows of A in packed form: first blocks of K, in each the panels, in each [k][kMR]. K counts operands.
struct PackedA {
  int64_t rows, K;
  int64_t block;  // depth
  int64_t panels;
  int64_t height;  // rows of a panel: equal ones, at most kMR

  PackedA(int64_t rows, int64_t K, int64_t most_depth)
      : rows(rows),
        K(K),
        block(depth_of_block(K, most_depth)),
        panels(ceil_div(rows, tuning::kMR)),
        height(ceil_div(rows, panels)) {}
  int64_t blocks() const { return ceil_div(K, block); }
  int64_t depth(int64_t k0) const { return min(block, K - k0); }
  int64_t pitch(int64_t k0) const { return ceil_div(depth(k0), kDepthOfA) * kDepthOfA * tuning::kMR; }
  int64_t offset(int64_t panel, int64_t k0) const { return k0 * panels * tuning::kMR + panel * pitch(k0); }
  int64_t size() const { return offset(panels, (K - 1) / block * block); }

  static int64_t depth_of_block(int64_t K, int64_t most) {
    return ceil_div(ceil_div(K, ceil_div(K, most)), 64) * 64;  // whole words of bits
  }
};

// How C is cut into units of work: a panel of B by a range of panels of A. Every thread gets an equal share of columns
// if whole vectors allow, else of rows. By rows, each takes its own through all of B, which it packs for itself: where
// A is not packed, and is to be read once.
class Partition {
 public:
  Partition(int64_t N, const PackedA& A, int threads, bool by_rows = false)
      : N_(N), vectors_(ceil_div(N, Vec::kLanes)), row_panels_(A.panels), by_rows_(by_rows) {
    if (!by_rows && ceil_div(vectors_, threads) * threads * 15 <= vectors_ * 16) {
      shares_ = threads;
    } else {
      splits_ = max<int64_t>(min<int64_t>(threads, A.rows / tuning::kMinRowsPerTask), 1);
    }
    panels_ = ceil_div(ceil_div(vectors_, shares_), tuning::kNV);
  }

  struct Unit {
    int64_t column, columns;  // of B and C
    int64_t first, last;      // panels of A
  };

  int64_t splits() const { return splits_; }
  int64_t units() const { return shares_ * panels_ * splits_; }
  Unit operator[](int64_t unit) const {
    const int64_t of_share = by_rows_ ? unit : unit / splits_;
    const int64_t panel = of_share % panels_, share = by_rows_ ? 0 : of_share / panels_;
    const int64_t split = by_rows_ ? unit / panels_ : unit % splits_;
    const int64_t begin = vectors_ * share / shares_, size = vectors_ * (share + 1) / shares_ - begin;
    const int64_t column = (begin + size * panel / panels_) * Vec::kLanes;
    const int64_t end = min((begin + size * (panel + 1) / panels_) * Vec::kLanes, N_);
    return {column, end - column, row_panels_ * split / splits_, row_panels_ * (split + 1) / splits_};
  }

 private:
  int64_t N_, vectors_, row_panels_;
  bool by_rows_;
  int64_t shares_ = 1, panels_, splits_ = 1;
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
