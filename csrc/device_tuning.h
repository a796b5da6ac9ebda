// The numbers that steer the choice of path on a device, from what an H200 took (bench/results/gpu-timing.json).
#pragma once

#include <cstdint>

namespace masked_ops::cuda {

// Up to so many rows the fused GEMM of Hopper is quicker than a masked copy and torch's GEMM. bf16, us, forward:
// 4096x4096 18 and 28 for 1 row, 29 and 41 for 512, 86 and 101 for 2,048, 345 and 332 for 8,192; 8192x8192 1,360 and
// 1,397 for 8,192. (The gradient of the weight: torch's GEMM and 16 us for masking it in place are 107 for 2,048 rows,
// fused 97.) Small weights are masked in 3 us, and their gradients took fused 5 to 20% longer than torch's: a step of
// 3072x768 took 27 us where the hook took 30 for 256 rows, 34 and 34 for 512, 187 and 175 for 8,192.
inline constexpr int64_t kSmallWeight = 8 << 20;
inline constexpr int64_t kMostRowsOfSmall = 256;
inline constexpr double kMostRowsPerWeight = 3.6e-4;

inline bool prefers_gemm_sm90(int64_t rows, int64_t weights) {
  if (weights < kSmallWeight) return rows <= kMostRowsOfSmall;
  return double(rows) <= kMostRowsPerWeight * double(weights);
}

// The one for Ampere and Ada (mma.sync) is not chosen. It took 71 us where a masked copy and cuBLAS took 41, 512 rows
// on the H200; on the devices that it was written for it has not been measured.
inline constexpr int64_t kMostFusedRowsSm80 = -1;

// Rows that decode takes; see cuda/api.h.
inline constexpr int64_t kMostDecodeRows = 64;

// The kernels whose values are laid out, by models and not measured (bench/results/gpu-predictions.md): decode_sliced
// and decode_gathered are to take, 8192x8192, 9.5 and 10.2 us for one row at density .1, 10.5 and 10.4 for four; 17 and
// 16.5, 18.5 and 16.5 at .25. Below a million weights a launch takes longer than they do.
// Many bytes a value, as uneven masks make them (decode reads 4), are not worth it: few weights, of which gathered
// columns take more, are soon read all the same.
inline constexpr double kMostSlicedDensity = 0.2;
inline constexpr int64_t kLeastLaidOutWeights = 1 << 20;
inline constexpr double kMostSlicedBytes = 5, kMostGatheredBytes = 8;

// The compact path, by arithmetic and not measured (bench/results/gpu-predictions.md): per nanosecond, the operations
// of a fast product (so that saving some of them is not overrated), the bytes that one reads of a weight, and those
// that gathering and scattering read and write; nanoseconds of one more call of torch's; and of decode, for one row,
// besides its values, and how many of them in a nanosecond. Other GPUs compute and read in much the same proportion.
inline constexpr double kFlops = 700e3, kDoubleFlops = 60e3;
inline constexpr double kReadBytes = 4000, kMoveBytes = 3000, kCall = 3000;
inline constexpr double kDecode = 5700, kDecodeValues = 800;
inline constexpr double kCompactMargin = 0.9;
// Under autocast a weight is masked and rounded in one pass, unless so little is left that this path comes into
// question, which takes the rounded weight.
inline constexpr double kMostShareLeft = 0.75;

}  // namespace masked_ops::cuda
