// The numbers that steer the choice of path on a device. None is measured yet: they follow from the bytes that a path
// moves (see bench/results/gpu-predictions.md), and the first run on a GPU replaces them.
#pragma once

#include <cstdint>

namespace masked_ops::cuda {

// Below, a GEMM is bound by reading the weight, and masking it on the way is worth the most; but tensor cores want 16
// rows, and the fused kernels tiles of 64.
inline constexpr int64_t kLeastFusedRows = 64;

// Above, a fused GEMM at 0.95 (Hopper) or 0.90 (Ampere) of cuBLAS's rate loses more than a masked copy costs, which is
// 379 rows' worth of a bf16 GEMM. The gradient of the weight has no least number of rows: with few it is bound by
// writing the gradient, which to mask in place is to read and write it once more (16 us beside torch's 91 of an H200,
// 4096x4096 and 2,048 rows).
inline constexpr int64_t kMostFusedRowsSm90 = 7200;
inline constexpr int64_t kMostFusedRowsSm80 = 3400;

// Rows that decode takes; see cuda/api.h.
inline constexpr int64_t kMostDecodeRows = 64;

}  // namespace masked_ops::cuda
