// The numbers that steer the choice of path on a device, from what an H200 took (bench/results/gpu-timing.json).
#pragma once

#include <cstdint>

namespace masked_ops::cuda {

// Up to so many rows the fused GEMM of Hopper is quicker than a masked copy and torch's GEMM: 4096x4096, bf16, us:
// 15 and 27 for 1 row, 27 and 41 for 512, 84 and 99 for 2,048, 370 and 375 for 8,192. Beyond, it would have to run at
// 0.98 of cuBLAS. The gradient of the weight is bound by writing it where rows are few, which to mask in place is to
// read and write it once more: 16 us, whatever the rows.
inline constexpr int64_t kMostFusedRowsSm90 = 12288;

// The one for Ampere and Ada (mma.sync) is not chosen. It took 71 us where a masked copy and cuBLAS took 41, 512 rows
// on the H200; on the devices that it was written for it has not been measured.
inline constexpr int64_t kMostFusedRowsSm80 = -1;

// Rows that decode takes; see cuda/api.h.
inline constexpr int64_t kMostDecodeRows = 64;

}  // namespace masked_ops::cuda
