// How many rows of input a tile of gemm_sm90 has.
#pragma once

#include "bits.h"
#include "tuning.h"

namespace masked_ops::cuda {

// 64, 128 or 256: the one with which all multiprocessors are done first. A step over 64 of the contraction takes the
// tensor cores 2 cycles per row, and the masking, which every tile does again, at least kSm90StepCycles.
inline int sm90_tile_rows(int64_t M, int64_t R, int multiprocessors) {
  int best = 0;
  double best_cycles = 0;
  for (const int rows : {256, 128, 64}) {
    const int64_t tiles = ceil_div<int64_t>(M, rows) * ceil_div<int64_t>(R, 128);
    const double step = 2.0 * rows > tuning::kSm90StepCycles ? 2.0 * rows : tuning::kSm90StepCycles;
    const double cycles = double(ceil_div<int64_t>(tiles, multiprocessors)) * step;
    if (best == 0 || cycles < best_cycles) {
      best = rows;
      best_cycles = cycles;
    }
  }
  return best;
}

}  // namespace masked_ops::cuda
