// How gemm_sm90 cuts a product into pieces of work.
#pragma once

#include "bits.h"
#include "tuning.h"

namespace masked_ops::cuda {

inline constexpr int kSm90R = 128, kSm90C = 64;  // operand rows of a tile; the contraction of a step

struct Sm90Plan {
  int rows;    // of input in a tile: 64, 128 or 256
  int splits;  // of the contraction, whose sums are added up by a second kernel
  int steps;   // over the contraction in each split but the last; even, and none is empty
};

// The plan with which all multiprocessors are done first. A step takes the tensor cores 4 cycles per row, and the
// masking, which every tile does again, at least kSm90StepCycles.
inline Sm90Plan sm90_plan(int64_t M, int64_t R, int64_t C, int multiprocessors, bool may_split) {
  const int64_t all_steps = ceil_div<int64_t>(C, 2 * kSm90C) * 2;
  Sm90Plan best = {};
  double best_cycles = 0;
  for (const int rows : {256, 128, 64}) {
    constexpr int kCluster = tuning::kSm90Cluster;
    const int64_t tiles = ceil_div<int64_t>(M, rows) * ceil_div<int64_t>(R, kSm90R * kCluster) * kCluster;
    const double step = 4.0 * rows > tuning::kSm90StepCycles ? 4.0 * rows : tuning::kSm90StepCycles;
    for (int wanted = 1; wanted <= tuning::kSm90Splits; ++wanted) {
      // More splits than there are idle multiprocessors only cost memory.
      if (wanted > 1 && (!may_split || tiles * wanted > multiprocessors)) break;
      const int64_t steps = ceil_div<int64_t>(ceil_div<int64_t>(all_steps, wanted), 2) * 2;
      const int64_t splits = ceil_div<int64_t>(all_steps, steps);
      double cycles = double(ceil_div<int64_t>(tiles * splits, multiprocessors)) * double(steps) * step;
      if (splits > 1) {
        cycles += tuning::kSm90SplitCycles + tuning::kSm90SplitCyclesPerSum * double(splits) * double(M) * double(R);
      }
      if (best.rows == 0 || cycles < best_cycles) {
        best = {rows, int(splits), int(steps)};
        best_cycles = cycles;
      }
    }
  }
  return best;
}

inline size_t sm90_workspace(int64_t M, int64_t R, const Sm90Plan& plan) {
  return plan.splits == 1 ? 0 : size_t(plan.splits) * M * R * sizeof(float);
}

}  // namespace masked_ops::cuda
