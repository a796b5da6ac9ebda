// How gemm_sm90 cuts a product into pieces of work.
#pragma once

#include <initializer_list>

#include "bits.h"
#include "tuning.h"

namespace masked_ops::cuda {

inline constexpr int kSm90R = 128, kSm90C = 64;  // operand rows of a tile; the contraction of a step

struct Sm90Plan {
  int rows;    // of input in a tile: 64, 128, 192 or 256
  int splits;  // of the contraction, each a block of a cluster; none is without a pair of steps
};

// Whether there is a kernel for it, and work for all of a cluster.
inline bool sm90_plan_fits(const Sm90Plan& plan, int64_t C) {
  const bool tile = plan.rows > 0 && plan.rows % 64 == 0 && plan.rows <= 256;
  const bool cluster = (plan.splits >= 1 && plan.splits <= 4) || plan.splits == tuning::kSm90Splits;
  return tile && cluster && plan.splits <= ceil_div<int64_t>(C, 2 * kSm90C);
}

// Clusters that run at once. Those of 2 always find room; larger ones lie within a group of 16 to 18 multiprocessors,
// of which some are cut off. (On an H200 with 132: 30 of 4, 15 of 8.)
inline int64_t sm90_clusters(int multiprocessors, int blocks) {
  if (blocks <= 2) return multiprocessors / blocks;
  return (multiprocessors > 12 + blocks ? multiprocessors - 12 : blocks) / blocks;
}

// The plan with which all multiprocessors are done first.
inline Sm90Plan sm90_plan(int64_t M, int64_t R, int64_t C, int multiprocessors) {
  const int64_t pairs = ceil_div<int64_t>(C, 2 * kSm90C);
  Sm90Plan best = {};
  double best_cycles = 0;
  for (int rows = 256; rows > 0; rows -= 64) {
    const int64_t tiles = ceil_div<int64_t>(M, rows) * ceil_div<int64_t>(R, kSm90R);
    const double products = 4.0 * rows, loads = (kSm90R + rows) * kSm90C * 2 / tuning::kSm90BytesPerCycle;
    double step = products > loads ? products : loads;
    if (step < tuning::kSm90StepCycles) step = tuning::kSm90StepCycles;
    for (const int splits : {1, 2, 3, 4, tuning::kSm90Splits}) {
      // A cluster takes one tile: its blocks leave their sums where the next tile would come.
      if (splits > 1 && (splits > multiprocessors || splits > pairs)) break;
      if (splits > 1 && tiles > sm90_clusters(multiprocessors, splits)) break;
      const int64_t at_once = multiprocessors / splits;
      double cycles = double(ceil_div<int64_t>(pairs, splits)) * 2 * step + tuning::kSm90TileCycles;
      cycles *= double(ceil_div<int64_t>(tiles, at_once));
      if (splits > 1) cycles += tuning::kSm90SumCycles + rows * kSm90R * 4 / tuning::kSm90SumBytesPerCycle;
      if (best.rows == 0 || cycles < best_cycles) {
        best = {rows, splits};
        best_cycles = cycles;
      }
    }
  }
  return best;
}

}  // namespace masked_ops::cuda
